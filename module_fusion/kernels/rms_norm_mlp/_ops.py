from .cpu import rms_norm_mlp as _c
def rms_norm_mlp(x, w, o, t): return _c(x,w,o)
