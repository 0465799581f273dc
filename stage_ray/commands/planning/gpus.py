"""What a GPU and the node around it can do: vendors' figures, or a YAML of your own.

| GPU | source |
|---|---|
| h100 | NVIDIA H100 datasheet (SXM5) and DGX H100 user guide: eight ConnectX-7 of 400 Gbit/s |
| h200 | NVIDIA H200 datasheet (SXM) and DGX H200 user guide |
| a100-80gb, a100-40gb | NVIDIA A100 datasheet (SXM4) and DGX A100 user guide: eight ConnectX-6 of 200 Gbit/s |
| b200 | NVIDIA DGX B200 datasheet, a GPU's eighth |
| l40s, l4 | NVIDIA L40S and L4 datasheets; no NVLink; 100 and 25 Gbit/s of network a GPU |

Operations are *dense*: datasheets print twice as many "with sparsity". NVLink, PCIe and network count one direction,
half of what datasheets print. Memory is what torch reports on such a card, a little less than the name says.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from stage_ray.config import Section
from stage_ray.errors import ConfigError

GIB = 2**30


class Gpu(Section):
    """One GPU with its share of a node; TFLOP/s are dense, GB/s one way and decimal.

    Example:
        >>> GPUS["h100"].memory_bytes > 79 * GIB
        True
    """

    name: str = Field(description="What the plan calls it")
    memory_gib: float = Field(gt=0, description="Usable memory, GiB")
    bfloat16_tflops: float = Field(gt=0, description="Dense bfloat16 matrix products, TFLOP/s")
    float32_tflops: float = Field(gt=0, description="Float32 without tensor cores, TFLOP/s")
    memory_gbs: float = Field(gt=0, description="Memory bandwidth, GB/s")
    nvlink_gbs: float = Field(0.0, ge=0, description="NVLink of one GPU, one way, GB/s; 0: PCIe alone")
    pcie_gbs: float = Field(gt=0, description="PCIe of one GPU, one way, GB/s")
    network_gbs: float = Field(gt=0, description="RDMA network of one GPU, one way, GB/s: what NCCL uses between nodes")
    host_network_gbs: float = Field(12.5, gt=0, description="TCP network of one node, GB/s: what Ray uses")

    @property
    def memory_bytes(self) -> int:
        """Memory in bytes."""
        return int(self.memory_gib * GIB)

    @property
    def peer_gbs(self) -> float:
        """From one GPU of a node to another."""
        return self.nvlink_gbs or self.pcie_gbs

    def flops(self, dtype: str) -> float:
        """Operations a second in ``bfloat16`` or ``float32``."""
        return 1e12 * {"bfloat16": self.bfloat16_tflops, "float32": self.float32_tflops}[dtype]


def _gpu(name: str, memory: float, bf16: float, f32: float, hbm: float, nvlink: float, pcie: float, net: float) -> Gpu:
    return Gpu(
        name=name,
        memory_gib=memory,
        bfloat16_tflops=bf16,
        float32_tflops=f32,
        memory_gbs=hbm,
        nvlink_gbs=nvlink,
        pcie_gbs=pcie,
        network_gbs=net,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        #    name        GiB    bf16  f32   memory NVLink PCIe network
        _gpu("h100", 79.2, 989, 67, 3350, 450, 64, 50),
        _gpu("h200", 139.8, 989, 67, 4800, 450, 64, 50),
        _gpu("b200", 178.4, 2250, 80, 8000, 900, 64, 50),
        _gpu("a100-80gb", 79.1, 312, 19.5, 2039, 300, 32, 25),
        _gpu("a100-40gb", 39.4, 312, 19.5, 1555, 300, 32, 25),
        _gpu("l40s", 44.4, 362, 91.6, 864, 0, 32, 12.5),
        _gpu("l4", 22.0, 121, 30.3, 300, 0, 32, 3.1),
    )
}


def gpu_named(name: str) -> Gpu:
    """A GPU of the table, or of a YAML file with `Gpu`'s keys.

    Raises:
        ConfigError: neither, or the file lacks a key.

    Example:
        >>> gpu_named("H200").memory_gbs
        4800.0
    """
    known = GPUS.get(name.lower())
    if known is not None:
        return known
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--gpu {name} is neither known ({', '.join(GPUS)}) nor a .yaml file that describes one")
    if not path.is_file():
        raise ConfigError(f"--gpu {name}: there is no such file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Gpu.model_validate({"name": path.stem, **data} if isinstance(data, dict) else data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--gpu {name} is not readable YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        keys = ", ".join(Gpu.model_fields)
        raise ConfigError(f"--gpu {name}: {key}: {first['msg']}; its keys are {keys}") from error
