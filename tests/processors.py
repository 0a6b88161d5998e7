"""Weaker processors, as far as this one can play them: the environment that holds each library to their instructions.

They hold on x86-64 alone, and from above: a processor without AVX-512 stays without it. Pillow and the C library's own
mathematics are not held.
"""

OPENCV_WITHOUT_AVX2 = {"OPENCV_CPU_DISABLE": "SSE4.2,AVX,FP16,AVX2,AVX512-SKX"}
"""Apart, because what OpenCV draws then is another picture, in a few pixels: `test_augment.py` says how many."""

SSE41 = {
    "ATEN_CPU_CAPABILITY": "default",  # torch's own loops
    "ONEDNN_MAX_CPU_ISA": "SSE41",  # its products
    "MKL_CBWR": "COMPATIBLE",  # its linear algebra
    "OPENBLAS_CORETYPE": "Nehalem",  # that of numpy and scipy
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",  # numpy's own loops; its least is SSE4.2
    "NUMBA_CPU_NAME": "penryn",
    "NUMBA_CPU_FEATURES": "+sse4.1",
    "OPENCV_CPU_DISABLE": "AVX512-SKX",
    "ARROW_USER_SIMD_LEVEL": "NONE",
}
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2",
    "OPENCV_CPU_DISABLE": "AVX512-SKX",
    "ARROW_USER_SIMD_LEVEL": "AVX2",
}
LEVELS = {"default": {}, "AVX2": AVX2, "SSE4.1": SSE41}
"""Variables of each level, by its name; "default" is the processor as it is."""
