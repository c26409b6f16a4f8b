"""The one extension, `ce_fast._kernels`: its C sources, and whether the compiler has OpenMP.

Without OpenMP the build is serial. Without a compiler the package installs all the same and runs on Numba;
CE_FAST_REQUIRE_EXT=1 turns that into a failure.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("CE_FAST_REQUIRE_EXT", "0") not in ("", "0")
SOURCES = ["baseline", "avx2", "avx512"]
# Without -fno-trapping-math GCC does not vectorize exp. Never -ffast-math: it sets flush-to-zero in the whole process.
# GCC would zero the few partial sums of a tile by memset, as `rep stos`: 30 cycles before every 80 of exponentials.
GNU_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
GNU_FLAGS.append("-fno-tree-loop-distribute-patterns")
OPENMP = "-fopenmp"
OPENMP_PROBE = """
#include <omp.h>
int main(void) {
    int n = 0;
    #pragma omp parallel for reduction(+:n)
    for (int i = 0; i < 100; i++) n += 1;
    return n == 100 && omp_get_max_threads() > 0 ? 0 : 1;
}
"""


def openmp_works(compiler):
    """Compile, link and run a small OpenMP program."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(OPENMP_PROBE)
        try:
            objects = compiler.compile([str(source)], output_dir=folder, extra_postargs=[OPENMP])
            compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=[OPENMP])
            return subprocess.run([str(Path(folder, "probe"))], timeout=60).returncode == 0
        except Exception as error:  # whatever a compiler does when it lacks OpenMP
            print(f"OpenMP probe: {error}", file=sys.stderr)
            return False


class BuildKernels(build_ext):
    def build_extension(self, ext):
        ext.extra_compile_args = list(GNU_FLAGS)
        if openmp_works(self.compiler):
            ext.extra_compile_args.append(OPENMP)
            ext.extra_link_args = [OPENMP]
        else:
            warnings.warn("ce_fast: this compiler has no working OpenMP; the kernels will use one thread", stacklevel=2)
        super().build_extension(ext)

    def run(self):
        try:
            super().run()
        except Exception as error:
            if REQUIRED:
                raise
            warnings.warn(
                f"ce_fast: the compiled kernels could not be built ({error}). The package works without them on its "
                "Numba backend: pip install 'ce_fast[numba]'. CE_FAST_REQUIRE_EXT=1 makes this an error.",
                stacklevel=2,
            )
            self.extensions = []  # so that nothing later looks for the file


csrc = Path("ce_fast", "csrc")
names = [f"isa_{isa}.c" for isa in SOURCES] + ["dispatch.c", "memory.c", "targets.c"]
kernels = Extension(
    "ce_fast._kernels",
    sources=["ce_fast/_kernels.pyx", *[str(csrc / name) for name in names]],
    depends=[str(path) for path in sorted(csrc.glob("*.h"))],
    include_dirs=[str(csrc), np.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")],
)
setup(ext_modules=[kernels], cmdclass={"build_ext": BuildKernels})
