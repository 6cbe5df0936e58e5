"""The layers of a GPT-2 for inference on few rows at a time, and the keys and values that they keep."""

import functools

import torch
import torch.nn.functional as F

from utils import HEAD_SIZE

GRAIN = 2**15  # PyTorch gives each thread at least so many elements of an elementwise operation


def apply_gelu(x):
    """Replaces x, contiguous float32, by its tanh-GELU, x·sigmoid(2u), on a CPU faster than by a tanh, except for a few rows.

    What an element becomes depends neither on how many others there are nor on the number of threads: what is left at the
    end of a thread's share, less than a vector of the processor, PyTorch computes by other instructions. So x is handed
    over in pieces of which each thread's share is a whole grain.

    Args:
        x: a multiple of 64 elements.
    """
    parts = (x,)
    if x.numel() > GRAIN:
        elements = x.view(-1)
        num_whole = len(elements) // GRAIN * GRAIN
        parts = *elements[:num_whole].split(GRAIN * torch.get_num_threads()), elements[num_whole:]
    factor = x.new_tensor(1.5957691216057308)  # 2 · sqrt(2 / pi)
    for part in parts:
        # 2u = 2 · sqrt(2 / pi) · (x + 0.044715 · x³)
        part.mul_(torch.addcmul(factor, part, part, value=0.07135481627260025).mul_(part).sigmoid_())


class PackedLinear:
    """A linear layer for few rows at a time; on a CPU, its weight is laid out once in the way that oneDNN reads it.

    PyTorch's own product lays the weight out anew in every call; for a few dozen rows that takes as long as the product. For
    small weights it is faster all the same, but what it returns for a row depends on the number of rows and of threads.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        gelu: whether the tanh-GELU follows.
    """

    def __init__(self, weight, bias=None, gelu=False):
        self.weight, self.bias, self.gelu = weight, bias, gelu
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if weight.dtype != torch.float32:
            self.packed = self.packed and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)  # best for 32 rows, good for all

    def __call__(self, x, residual=None):
        """Returns (N, out) for x (N, in), added to `residual` (N, out) unless that is None.

        A row's numbers do not depend on the other rows, nor on how many there are.
        """
        if not self.packed:
            x = F.linear(x, self.weight, self.bias)
            x = F.gelu(x, approximate="tanh") if self.gelu else x
            return x if residual is None else residual + x
        if x.shape[0] == 1 and x.dtype == torch.float32:  # for a single row, oneDNN adds up in another order
            x, residual = torch.cat((x, x)), residual if residual is None else torch.cat((residual, residual))
            return self(x, residual)[:1]
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        applies_gelu = self.gelu and x.dtype == torch.float32
        then = ("gelu", [], "tanh") if self.gelu and not applies_gelu else ("none", [], "")
        x = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *then)
        if applies_gelu:
            apply_gelu(x)
        return x


class Blocks:
    """The blocks and the last layer norm of a GPT2Model, for inference on rows (N, D) of any sequences.

    Args:
        gpt2: a GPT2Model of `make_configs`, in eval mode.
    """

    def __init__(self, gpt2):
        assert gpt2.config.activation_function == "gelu_pytorch_tanh"  # see _fused
        self.num_heads, self.last_norm = gpt2.config.n_head, layer_norm(gpt2.ln_f)
        self.layers = [
            (
                layer_norm(block.ln_1),
                PackedLinear(self._by_heads(block.attn.c_attn.weight.t()), self._by_heads(block.attn.c_attn.bias)),
                PackedLinear(block.attn.c_proj.weight.t(), block.attn.c_proj.bias),
                layer_norm(block.ln_2),
                PackedLinear(block.mlp.c_fc.weight.t(), block.mlp.c_fc.bias, gelu=True),
                PackedLinear(block.mlp.c_proj.weight.t(), block.mlp.c_proj.bias),
            )
            for block in gpt2.h
        ]

    def _by_heads(self, weight):
        """Returns a weight (3·D, …) of queries, keys and values as (H·3·64, …): those of a head beside each other."""
        return weight.unflatten(0, (3, self.num_heads, HEAD_SIZE)).transpose(0, 1).flatten(0, 2)

    def __call__(self, x, attend):
        """Returns (N, D) for x (N, D), positions added.

        Args:
            attend: function (layer, qkv) with qkv (N, H, 3, 64), the queries, keys and values; returns (N, D).
        """
        for layer, (norm_1, qkv, attended, norm_2, inner, outer) in enumerate(self.layers):
            # (N, D) -> (N, 3·D) -> (N, H, 3, 64)
            x = attended(attend(layer, qkv(norm_1(x)).view(-1, self.num_heads, 3, HEAD_SIZE)), x)
            x = outer(inner(norm_2(x)), x)
        return self.last_norm(x)


def layer_norm(norm):
    """Returns an nn.LayerNorm as a function that is called faster."""
    return functools.partial(
        torch.layer_norm, normalized_shape=norm.normalized_shape, weight=norm.weight, bias=norm.bias, eps=norm.eps
    )


def round_up(number, multiple):
    """Returns the smallest multiple of `multiple` that is `number` or more."""
    return -(-number // multiple) * multiple


class KVCache:
    """Keys and values of every layer of a GPT-2 for a batch of sequences, allocated once.

    On a CPU they are float32 also for a bf16 model: PyTorch's attention of one query is then up to three times faster.

    Args:
        gpt2: the GPT2Model.
        batch_size: B.
        length: the most positions that are used.

    Attributes:
        length: T, `length` rounded up to a multiple of 16.
        held: (layers, B, H, 2, T, 64), the keys and the values.
    """

    def __init__(self, gpt2, batch_size, length):
        config, self.length = gpt2.config, round_up(length, 16)
        dtype = torch.float32 if gpt2.device.type == "cpu" else gpt2.dtype
        self.model_dtype = gpt2.dtype
        self.held = torch.zeros(config.n_layer, batch_size, config.n_head, 2, self.length, HEAD_SIZE, dtype=dtype, device=gpt2.device)
        self._places = torch.arange(self.length, device=gpt2.device)

    def mask(self, positions, longest):
        """Returns what `attend` adds to the scores of queries at `positions`, int64 (N,): (N·H, 1, longest).

        It is 0 for what a query sees, and -inf for what is later.
        """
        later = self._places[:longest] > positions[:, None, None, None]  # (N, 1, 1, longest)
        unseen = torch.zeros(later.shape, dtype=self.held.dtype, device=later.device).masked_fill_(later, -torch.inf)
        return unseen.expand(-1, self.held.shape[2], -1, -1).flatten(0, 1)

    def attend(self, layer, qkv, mask, where, rows=None):
        """Keeps the keys and values of N queries, each at one position of a sequence; returns their attention (N, D).

        A query's numbers do not depend on the others. PyTorch's scaled_dot_product_attention is no faster for one query on
        a CPU, and the last digits of what it returns there depend on the row's place in the batch.

        Args:
            layer: its number.
            qkv: (N, H, 3, 64).
            mask: (N·H, 1, longest), see `mask`; or (1, 1, longest), if it is the same for all.
            where: (rows, positions), each an int64 tensor (N,), or rows a slice and positions one number.
            rows: int64 (N,), the row that each query sees; None = the first N.
        """
        cache, qkv, (put_rows, positions) = self.held[layer], qkv.to(self.held.dtype), where
        cache[put_rows, :, :, positions] = qkv[:, :, 1:]  # (N, H, 2, 64)
        count = qkv.shape[0]
        seen = cache[:count] if rows is None else cache.index_select(0, rows)  # (N, H, 2, T, 64)
        keys, values = seen[:, :, :, : mask.shape[2]].flatten(0, 1).unbind(1)  # (N·H, longest, 64) each
        queries = qkv[:, :, 0].flatten(0, 1).unsqueeze(1)  # (N·H, 1, 64)
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=HEAD_SIZE**-0.5)  # (N·H, 1, longest)
        return torch.bmm(scores.softmax(-1), values).view(count, -1).to(self.model_dtype)
