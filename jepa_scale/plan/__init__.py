"""What a run would need on machines that are not at hand: memory, communication, time.

:func:`jepa_scale.plan.planner.make_plan` is the entrance, ``jepa-scale plan`` its command (``docs/plan.md``). The model is built
on the ``meta`` device and takes one step there, so that what is counted is what the code does; engines are modelled
(:mod:`jepa_scale.plan.fsdp`, :mod:`jepa_scale.plan.zero`), and ``benchmarks/plan.py`` compares them with the real ones.
"""
