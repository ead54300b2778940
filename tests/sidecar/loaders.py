"""Small modules that load checkpoints the way vLLM's models do."""

from __future__ import annotations

import torch
from torch import nn

from apollo_grpc.sidecar.v1 import weight_export_pb2 as pb

HIDDEN, HEADS, KV = 8, 6, 2
VOCAB, PADDED = 10, 16
EXPERTS, INNER = 3, 4


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape), requires_grad=False)


class Loading(nn.Module):
    """Calls `load_<name>(tensor)` for the last parts of each checkpoint name."""

    def load_weights(self, weights):
        for name, tensor in weights:
            getattr(self, "load_" + name.replace(".", "_"))(tensor)


class FusedQkv(Loading):
    """q, k, v and their biases stacked on rows, as QKVParallelLinear does."""

    def __init__(self):
        super().__init__()
        self.qkv, self.qkv_bias = weight(HEADS + 2 * KV, HIDDEN), weight(HEADS + 2 * KV)

    def _load(self, tensor, start):
        target = self.qkv if tensor.ndim == 2 else self.qkv_bias
        target.data.narrow(0, start, tensor.shape[0]).copy_(tensor)

    def load_q(self, tensor):
        self._load(tensor, 0)

    def load_k(self, tensor):
        self._load(tensor, HEADS)

    def load_v(self, tensor):
        self._load(tensor, HEADS + KV)


class Transposed(Loading):
    """Stores [out, in] of a checkpoint that holds [in, out], as GPT-2's Conv1D."""

    def __init__(self):
        super().__init__()
        self.weight = weight(5, 3)

    def load_w(self, tensor):
        self.weight.data.copy_(tensor.t())


class Stacked(Loading):
    """Experts in one w13 and one w2, loaded from a checkpoint that names each expert."""

    def __init__(self):
        super().__init__()
        self.w13, self.w2 = weight(EXPERTS, 2 * INNER, HIDDEN), weight(EXPERTS, HIDDEN, INNER)

    def load_weights(self, weights):
        for name, tensor in weights:
            expert, kind = name.split(".")
            if kind == "down":
                self.w2.data[int(expert)].copy_(tensor)
            else:
                start = 0 if kind == "gate" else INNER
                self.w13.data[int(expert)].narrow(0, start, INNER).copy_(tensor)


class PaddedVocabulary(Loading):
    """The first V rows are the checkpoint's, the rest zero; the head is tied to it."""

    def __init__(self):
        super().__init__()
        self.embed = weight(PADDED, HIDDEN)
        self.head = self.embed

    def load_embed(self, tensor):
        self.embed.data[: tensor.shape[0]].copy_(tensor)
        self.embed.data[tensor.shape[0] :].fill_(0)


class Single(Loading):
    """One weight [4, 6], loaded by the function it was given."""

    def __init__(self, load):
        super().__init__()
        self.weight, self.other = weight(4, 6), weight(4, 6)
        self.load_w = lambda tensor: load(self, tensor)


def plan(roots, tensors=None) -> pb.TraceCheckpointMapRequest:
    """The request of a plan: roots by name, and (name, root, offset, shape, stride) tensors."""
    request = pb.TraceCheckpointMapRequest(epoch="e")
    for name, shape in roots.items():
        request.roots.add(name=name, shape=shape)
    if tensors is None:
        tensors = [(name, name, 0, shape, None) for name, shape in roots.items()]
    for name, root, offset, shape, stride in tensors:
        stride = stride or torch.empty(shape, device="meta").stride()
        request.tensors.add(
            checkpoint_name=name, root=root, offset=offset, shape=shape, stride=stride
        )
    return request
