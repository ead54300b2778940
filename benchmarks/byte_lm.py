"""A small language model over bytes, and the text that every Python has to train it on."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BYTES = 256
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "ensurepip"}
_OTHER_TEXT = ("pydoc_data", "encodings")
_HELD_OUT = 0.1


class Block(nn.Module):
    """Pre-norm attention and a GELU network of four times the width."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [batch, length, width] to the same shape."""
        x = x + self.out(self._attend(self.attention_norm(x)))
        update: Tensor = self.down(F.gelu(self.up(self.network_norm(x))))
        return x + update

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


class ByteLM(nn.Module):
    """A decoder with learned positions; predicts the next byte."""

    def __init__(self, width: int, layers: int, context: int):
        super().__init__()
        self.embed = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, max(1, width // 64)) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Logits [batch, length, 256] for `text` [batch, length], int64."""
        x = self.embed(text) + self.position.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, windows: Tensor) -> Tensor:
        """Mean loss in nats a byte, in float32, over `windows` [batch, length + 1]."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def new_model(width: int, layers: int, context: int, seed: int) -> ByteLM:
    """A float32 model on the CPU whose values are bfloat16 numbers: all variants start alike."""
    torch.manual_seed(seed)
    model = ByteLM(width, layers, context)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                p.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if residual else 0.02)
            p.copy_(p.bfloat16())
    return model


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes that are never trained on, uint8."""

    train: Tensor
    validation: Tensor
    source: str
    digest: str

    def describe(self) -> dict[str, str | int]:
        """What a result says of its text; the digest tells two Pythons' libraries apart."""
        return {
            "source": self.source,
            "train_bytes": self.train.numel(),
            "validation_bytes": self.validation.numel(),
            "sha256": self.digest,
        }


def library_text(cap: int) -> Text:
    """The sources of Python's standard library, at most `cap` bytes; a file is on one side whole.

    Files are taken, and assigned to a side, in the order of a hash of their names.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [p for p in root.rglob("*.py") if _is_source(p.relative_to(root))]
    files.sort(key=lambda p: _hash(p.relative_to(root)))
    train: list[bytes] = []
    validation: list[bytes] = []
    total = 0
    for path in files:
        content = path.read_bytes()
        if total + len(content) > cap:
            break
        total += len(content)
        held_out = _hash(path.relative_to(root))[-1] < _HELD_OUT * 256
        (validation if held_out else train).append(content)
    return _text(b"".join(train), b"".join(validation), "standard library, .py")


def other_text(cap: int) -> Text:
    """Text that `library_text` leaves out: the language reference, or else the codec tables."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in _OTHER_TEXT:
        content = b"".join(p.read_bytes() for p in sorted((root / name).glob("*.py")))[:cap]
        if len(content) > 50_000:
            cut = int(len(content) * (1 - _HELD_OUT))
            return _text(content[:cut], content[cut:], f"standard library, {name}")
    raise FileNotFoundError(f"The standard library in {root} has none of {_OTHER_TEXT}.")


def _is_source(relative: Path) -> bool:
    # _sysconfigdata holds this machine's build options.
    skipped = _SKIPPED | set(_OTHER_TEXT)
    return not skipped & set(relative.parts) and not relative.name.startswith("_sysconfigdata")


def _hash(relative: Path) -> bytes:
    return hashlib.sha256(relative.as_posix().encode()).digest()


def _text(train: bytes, validation: bytes, source: str) -> Text:
    sides = [torch.frombuffer(bytearray(side), dtype=torch.uint8) for side in (train, validation)]
    return Text(sides[0], sides[1], source, hashlib.sha256(train + b"\0" + validation).hexdigest())
