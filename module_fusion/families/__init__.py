"""Named families of groups, found in a model without paths: `fuse`."""

from . import patch_embeddings, rms_norm_mlp  # noqa: F401  (they register themselves)
from .family import FusionFamily, register_family
from .fuse import fuse
from .layout import WeightLayout
from .state_dicts import pack_state_dict, packed_layouts, unpack_state_dict

__all__ = [
    "FusionFamily",
    "WeightLayout",
    "fuse",
    "pack_state_dict",
    "packed_layouts",
    "register_family",
    "unpack_state_dict",
]
