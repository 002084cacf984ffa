"""The GPUs that the planner supports: memory, memory bandwidth and links, as stated by their vendors.

FLOP/s are those of :func:`jepa_scale.models.flops.peak_flops` for the driver's name of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from jepa_scale.utils.errors import InputError, suggestion

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU in the usual machine of its kind.

    Attributes:
        name: ``torch.cuda.get_device_name()``.
        memory: GiB that the driver offers.
        bandwidth: memory bandwidth, bytes/s.
        link: bytes/s in one direction to the other GPUs of the machine.
        network: bytes/s in one direction of its share of the machine's network cards.
        per_node: number of GPUs in a machine.
    """

    name: str
    memory: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8

    def flops(self, precision: str, tf32: bool) -> float:
        """Return the peak FLOP/s of dense matrix products.

        Raises:
            InputError: the GPU does not compute in that precision.
        """
        from jepa_scale.engines.precision import compute_dtype  # here: unknown names are refused without torch
        from jepa_scale.models.flops import peak_flops

        peak = peak_flops(self.name, compute_dtype(precision), tf32)
        if peak is None:
            raise InputError(
                f"engine.precision: {self.name} has no {precision}; set fp16 or fp32, or plan for another GPU"
            )
        return peak

    def reach(self, ranks: int, span: int) -> float:
        """Return the bytes/s at which each rank sends in a collective.

        The ``ranks`` ranks that take part are evenly spread over ``span`` neighbouring ranks.
        Between machines NCCL's rings use the network cards of all GPUs that take part. Data on its way from one machine to
        the next passes through each of these GPUs, so the rate grows with their number.
        """
        if span <= self.per_node:
            return self.link
        return min(self.link, self.network * max(1.0, self.per_node * ranks / span))


GPUS = {
    # NVIDIA H100, H200, A100 and B200 data sheets; DGX A100, H100, H200 and B200 user guides (NVLink 3, 4 and 5: 600, 900 and
    # 1,800 GB/s in both directions together; a network card of 200 or 400 Gbit/s a GPU)
    "h100": Gpu("NVIDIA H100 80GB HBM3", 79.6, 3.35e12, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 139.8, 4.8e12, 450e9, 50e9),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 79.3, 2.039e12, 300e9, 25e9),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 39.4, 1.555e12, 300e9, 25e9),
    "b200": Gpu("NVIDIA B200", 178.4, 7.7e12, 900e9, 50e9),
    # NVIDIA L40S data sheet: no NVLink, PCIe 4.0 x16; 200 Gbit/s for two GPUs in NVIDIA's reference servers
    "l40s": Gpu("NVIDIA L40S", 44.5, 0.864e12, 32e9, 12.5e9),
    # NVIDIA L4 and T4 data sheets: PCIe 4.0 and 3.0 x16; 100 Gbit/s for eight GPUs in the clouds' largest machines
    "l4": Gpu("NVIDIA L4", 22.0, 0.3e12, 32e9, 1.56e9),
    "t4": Gpu("Tesla T4", 14.6, 0.32e12, 16e9, 1.56e9),
    # NVIDIA's specifications of the GeForce cards: PCIe 4.0 x16, the 5090 5.0; a workstation of up to four with 10 Gbit/s
    "rtx3090": Gpu("NVIDIA GeForce RTX 3090", 23.6, 0.936e12, 32e9, 0.31e9, 4),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", 23.5, 1.008e12, 32e9, 0.31e9, 4),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", 31.4, 1.792e12, 64e9, 0.31e9, 4),
}
"""The GPUs by their names on the command line."""

RESERVED = 0.08
"""Fraction of the memory that the planner leaves free: CUDA's context, libraries' workspaces, NCCL's buffers, fragmentation. It is
a margin, not a measurement."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name on the command line.

    Raises:
        InputError: the name is not one of :data:`GPUS`.
    """
    key = name.lower()
    if key in GPUS:
        return GPUS[key]
    hint = suggestion(key, GPUS, f"choose one of {', '.join(GPUS)}")
    raise InputError(f"--gpu: unknown GPU {name!r}; {hint}")
