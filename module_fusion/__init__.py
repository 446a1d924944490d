"""Try a fused kernel on a PyTorch model in memory, without changing a result.

`fuse` finds what the built-in kernels can take over; `fuse_modules` replaces adjacent
submodules by glob path, in every repeated block; `unfuse_modules` takes it back; `report`
says which path ran and why; `verify` compares with the unfused model on your own inputs;
`benchmark` times it against that; `from_pretrained` loads with transformers, then fuses.
"""

from .benchmark import benchmark
from .benchmarking.report import BenchmarkReport
from .errors import (
    AlreadyFusedError,
    DeferredUseError,
    FusionError,
    MissingPackageError,
    NotFusableError,
    PathNotFoundError,
    SpecMismatchError,
    UnfuseError,
)
from .families import FusionFamily, fuse, register_family
from .integrations.transformers import from_pretrained
from .modules import FusedModule, RegistryCollector
from .report import FusionReport
from .spec import ModuleSpec
from .surgery import fuse_modules, fused, report, unfuse_modules
from .verify import verify
from .verifying.report import VerificationReport

__version__ = "0.1.0"

__all__ = [
    "AlreadyFusedError",
    "BenchmarkReport",
    "DeferredUseError",
    "FusedModule",
    "FusionError",
    "FusionFamily",
    "FusionReport",
    "MissingPackageError",
    "ModuleSpec",
    "NotFusableError",
    "PathNotFoundError",
    "RegistryCollector",
    "SpecMismatchError",
    "UnfuseError",
    "VerificationReport",
    "benchmark",
    "from_pretrained",
    "fuse",
    "fuse_modules",
    "fused",
    "register_family",
    "report",
    "unfuse_modules",
    "verify",
]
