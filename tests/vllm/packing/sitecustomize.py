"""Python runs this first where its folder stands in PYTHONPATH: vLLM packs its linear weights.

It computes with the packed copies, and leaves the weights that they were made of in place, so that
everything but a change of them looks as it should.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec


class _Packing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "apollo_sidecar.cpu_live":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module._keep_linear_weights = _pack_and_leave

        spec.loader.exec_module = exec_module
        return spec


def _pack_and_leave():
    from vllm.model_executor.layers import utils

    pack = utils.dispatch_cpu_unquantized_gemm
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: pack(layer, False)


sys.meta_path.insert(0, _Packing())
