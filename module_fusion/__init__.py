"""Try a fused kernel on a PyTorch model in memory, without changing a result.

`fuse` finds what the built-in kernels can take over; `fuse_modules` replaces adjacent
submodules by glob path, in every repeated block; `unfuse_modules` takes it back; `report`
says which path ran and why; `verify` compares with the unfused model on your own inputs;
`from_pretrained` loads with transformers, then fuses.
"""

from .errors import (
    AlreadyFusedError,
    DeferredUseError,
    FusionError,
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
from .verification import VerificationReport
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "AlreadyFusedError",
    "DeferredUseError",
    "FusedModule",
    "FusionError",
    "FusionFamily",
    "FusionReport",
    "ModuleSpec",
    "NotFusableError",
    "PathNotFoundError",
    "RegistryCollector",
    "SpecMismatchError",
    "UnfuseError",
    "VerificationReport",
    "from_pretrained",
    "fuse",
    "fuse_modules",
    "fused",
    "register_family",
    "report",
    "unfuse_modules",
    "verify",
]
