"""The planner: memory, communication and time of a run on machines that are not at hand.

:func:`jepa_scale.plan.planner.make_plan` is the entry point, ``jepa-scale plan`` its command (``docs/plan.md``). The model is
built on the ``meta`` device and takes one step there, so that the operations of the actual code are counted. The engines are
modelled (:mod:`jepa_scale.plan.fsdp`, :mod:`jepa_scale.plan.zero`); ``benchmarks/plan.py`` compares the models with the real
engines.
"""
