"""The metadata function of an sgl-kernel that registers no op for it, called by its C++ name.

sgl-kernel up to 0.3.21 and sglang-kernel 0.4.0 export `mha_fwd_get_scheduler_metadata` (hopper/flash_api.cpp) and
never register it. A small extension, compiled against the installed torch with g++, makes it an op that takes the
arguments by position as the registered ones do. For recordings and tests.
"""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES

import torch
from fa3_metadata.installed import provider_of
from torch.utils.cpp_extension import include_paths, library_paths

# Name of the op here -> what the function is called in the extension: up to sgl-kernel 0.3.16, and since.
SYMBOLS = {
    "legacy": "_Z30mha_fwd_get_scheduler_metadataiiiiiiiN3c1010ScalarTypeERKN2at6TensorERSt8optionalIS3_ES7_S7_S7_S7_"
    "S5_IiEibiibiS5_IbEi",
    "upstream": "_Z30mha_fwd_get_scheduler_metadatalllllllN3c1010ScalarTypeEN2at6TensorESt8optionalIS2_ES4_S4_S4_S4_S3_"
    "IlElblllblS3_IbEl",
}
_SOURCE = r"""
#include <dlfcn.h>
#include <torch/library.h>
using at::Tensor;
using Bool = std::optional<bool>;
using Int = std::optional<int64_t>;
using Lengths = std::optional<Tensor>;
using ConstLengths = std::optional<const Tensor>;

template <class Function>
Function *find(const std::string &library, const std::string &symbol) {
  void *extension = dlopen(library.c_str(), RTLD_NOW | RTLD_NOLOAD);
  TORCH_CHECK(extension, library, " is not loaded");
  void *found = dlsym(extension, symbol.c_str());
  TORCH_CHECK(found, library, " does not export ", symbol);
  return reinterpret_cast<Function *>(found);
}

Tensor legacy(std::string library, std::string symbol, int64_t b, int64_t mq, int64_t mk, int64_t h, int64_t hk,
              int64_t d, int64_t dv, at::ScalarType dtype, Tensor seqused_k, Lengths cu_q, Lengths cu_k,
              Lengths cu_k_new, Lengths seqused_q, Lengths leftpad_k, Int page_size, int64_t mk_new, bool causal,
              int64_t left, int64_t right, bool softcap, int64_t num_splits, Bool pack_gqa, int64_t sm_margin) {
  using Function = Tensor(int, int, int, int, int, int, int, at::ScalarType, const Tensor &, ConstLengths &,
                          ConstLengths &, ConstLengths &, ConstLengths &, ConstLengths &, std::optional<int>, int, bool,
                          int, int, bool, int, Bool, int);
  ConstLengths q(cu_q), k(cu_k), k_new(cu_k_new), used(seqused_q), pad(leftpad_k);
  std::optional<int> page = page_size ? std::optional<int>(*page_size) : std::nullopt;
  return find<Function>(library, symbol)(b, mq, mk, h, hk, d, dv, dtype, seqused_k, q, k, k_new, used, pad, page,
                                         mk_new, causal, left, right, softcap, num_splits, pack_gqa, sm_margin);
}

Tensor upstream(std::string library, std::string symbol, int64_t b, int64_t mq, int64_t mk, int64_t h, int64_t hk,
                int64_t d, int64_t dv, at::ScalarType dtype, Tensor seqused_k, Lengths cu_q, Lengths cu_k,
                Lengths cu_k_new, Lengths seqused_q, Lengths leftpad_k, Int page_size, int64_t mk_new, bool causal,
                int64_t left, int64_t right, int64_t chunk, bool softcap, int64_t num_splits, Bool pack_gqa,
                int64_t sm_margin) {
  using Function = Tensor(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, at::ScalarType, Tensor,
                          Lengths, Lengths, Lengths, Lengths, Lengths, Int, int64_t, bool, int64_t, int64_t, int64_t,
                          bool, int64_t, Bool, int64_t);
  return find<Function>(library, symbol)(b, mq, mk, h, hk, d, dv, dtype, seqused_k, cu_q, cu_k, cu_k_new, seqused_q,
                                         leftpad_k, page_size, mk_new, causal, left, right, chunk, softcap, num_splits,
                                         pack_gqa, sm_margin);
}

TORCH_LIBRARY(fa3_exported, m) {
  m.def("legacy", &legacy);
  m.def("upstream", &upstream);
}
"""


def exported_op(build: str) -> Callable[..., torch.Tensor]:
    """The function as an op, found in the installed package of `build`. Raises `RuntimeError` where it has none."""
    package = import_module(provider_of(build).op_module.partition(".")[0])
    folders = [pathlib.Path(folder) for folder in package.__path__]
    found = [file for folder in folders for suffix in EXTENSION_SUFFIXES for file in folder.rglob(f"*{suffix}")]
    import_module(provider_of(build).op_module)
    for library in dict.fromkeys(found):
        for name, symbol in SYMBOLS.items():
            if exports(library, symbol):
                _compile()
                return partial(getattr(torch.ops.fa3_exported, name), str(library), symbol)
    raise RuntimeError(f"{build} registers no op for scheduler metadata and exports no function that makes it")


def exports(library: pathlib.Path, symbol: str) -> bool:
    """Whether an extension that is loaded exports this name."""
    try:
        return hasattr(ctypes.CDLL(str(library), mode=ctypes.DEFAULT_MODE | 4), symbol)  # 4: RTLD_NOLOAD
    except OSError:
        return False


@lru_cache(maxsize=1)
def _compile() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, built = pathlib.Path(folder, "exported_op.cpp"), pathlib.Path(folder, "exported_op.so")
        source.write_text(_SOURCE)
        includes = [f"-I{path}" for path in include_paths()]
        libraries = [f"-L{path}" for path in library_paths()]
        command = ["g++", "-std=c++20", "-shared", "-fPIC", *includes, str(source), "-o", str(built), *libraries]
        done = subprocess.run([*command, "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ cannot compile the call of the exported function:\n{done.stderr[-4000:]}")
        torch.ops.load_library(str(built))
