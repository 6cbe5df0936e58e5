"""The layers of a GPT-2 for inference on few rows, and a key-value cache."""

import torch
import torch.nn.functional as F

from utils import HEAD_SIZE


def apply_gelu(x):
    """Applies tanh-GELU, as x·sigmoid(2u), in place to a contiguous float32 tensor on the CPU.

    x has a multiple of 64 elements. Bit-identical for any number of rows and threads. PyTorch rounds differently in the scalar
    tail of each thread's chunk, so the chunks are sized to have no tail. Faster than tanh, except for a few rows.
    """
    parts, grain = (x,), 2**15  # the fewest elements that PyTorch gives a thread in an elementwise operation
    if x.numel() > grain:
        elements = x.view(-1)
        num_whole = len(elements) // grain * grain
        parts = *elements[:num_whole].split(grain * torch.get_num_threads()), elements[num_whole:]
    factor = x.new_tensor(1.5957691216057308)  # 2 · sqrt(2 / pi)
    for part in parts:
        # 2u = 2 · sqrt(2 / pi) · (x + 0.044715 · x³)
        part.mul_(torch.addcmul(factor, part, part, value=0.07135481627260025).mul_(part).sigmoid_())


class PackedLinear:
    """A linear layer for few rows, with its weight packed once for oneDNN on CPUs.

    F.linear packs the weight in every call, which takes as long as the product of a few dozen rows. It is faster for small
    weights, but then a row's result depends on the numbers of rows and threads.

    `weight` is (out, in), `bias` (out,) or None. With `gelu` the tanh-GELU follows.
    """

    def __init__(self, weight, bias=None, gelu=False):
        self.weight, self.bias, self.gelu = weight, bias, gelu
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if weight.dtype != torch.float32:
            self.packed = self.packed and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)  # best for 32 rows, good for all

    def __call__(self, x, residual=None):
        """Returns (N, out) for x (N, in), plus `residual` (N, out) if given. In float32 rows are independent."""
        if not self.packed:
            x = F.linear(x, self.weight, self.bias)
            x = F.gelu(x, approximate="tanh") if self.gelu else x
            return x if residual is None else residual + x
        if len(x) == 1 and x.dtype == torch.float32:  # oneDNN sums in another order for a single row
            return self(x.expand(2, -1), None if residual is None else residual.expand(2, -1))[:1]
        multiply = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return multiply.binary(x, residual, self.weight, self.bias, "add")
        if self.gelu and x.dtype == torch.bfloat16:
            return multiply(x, self.weight, self.bias, "gelu", [], "tanh")
        x = multiply(x, self.weight, self.bias, "none", [], "")
        if self.gelu:
            apply_gelu(x)
        return x


class Blocks:
    """Blocks and last layer norm of a GPT2Model in eval mode, for rows (N, D)."""

    def __init__(self, gpt2):
        assert gpt2.config.activation_function == "gelu_pytorch_tanh"  # see utils._fused
        self.num_heads, self.last_norm = gpt2.config.n_head, layer_norm(gpt2.ln_f)
        self.layers = []
        for block in gpt2.h:
            modules = block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj
            linears = [PackedLinear(each.weight.t(), each.bias, gelu=each is block.mlp.c_fc) for each in modules]
            self.layers.append((layer_norm(block.ln_1), layer_norm(block.ln_2), *linears))

    def __call__(self, x, attend):
        """Returns (N, D) for x (N, D), positions added. attend(layer, qkv) returns (N, D) for qkv (N, 3, H, 64)."""
        for layer, (norm_1, norm_2, qkv, attended, inner, outer) in enumerate(self.layers):
            # (N, D) -> (N, 3·D) -> (N, 3, H, 64)
            x = attended(attend(layer, qkv(norm_1(x)).view(-1, 3, self.num_heads, HEAD_SIZE)), x)
            x = outer(inner(norm_2(x)), x)
        return self.last_norm(x)


def layer_norm(norm):
    """Returns an nn.LayerNorm as a plain function, which has less overhead."""
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


class KVCache:
    """Keys and values of all layers of a GPT-2 for a batch, allocated once.

    On a CPU they are float32 for a bf16 model too, since attention of one query is then up to three times faster.

    `kv` is (layers, B, H, 2, T, 64), the keys and the values. T is `length` rounded up to a multiple of 16.
    """

    def __init__(self, gpt2, batch_size, length):
        self.length = -(-length // 16) * 16  # T
        shape = gpt2.config.n_layer, batch_size, gpt2.config.n_head, 2, self.length, HEAD_SIZE
        self.kv = torch.zeros(shape, dtype=torch.float32 if gpt2.device.type == "cpu" else gpt2.dtype, device=gpt2.device)

    def views(self, rows, longest):
        """Returns the first rows and positions of each layer, for `attend_cached`."""
        kv = self.kv[:, :rows, :, :, :longest]  # (layers, B, H, 2, longest, 64)
        keys, values = kv.flatten(1, 2).unbind(2)  # (layers, B·H, longest, 64) each
        return list(zip(kv, keys.transpose(2, 3), values))

    def mask(self, positions, longest):
        """Returns the mask (N·H, 1, longest) of queries at `positions`, int64 (N,). It is 0 up to the position, then -inf."""
        later = torch.arange(longest, device=positions.device) > positions[:, None, None, None]  # (N, 1, 1, longest)
        mask = torch.zeros(later.shape, dtype=self.kv.dtype, device=later.device).masked_fill_(later, -torch.inf)
        return mask.expand(-1, self.kv.shape[2], -1, -1).flatten(0, 1)


def attend_cached(qkv, view, where, mask):
    """Caches one position of each sequence and returns the attention of its query, (B, D).

    Rows are independent. On a CPU, scaled_dot_product_attention is no faster for one query, and its rounding depends on a row's
    index in the batch.

    `qkv` is (B, 3, H, 64). `view` is one layer of `KVCache.views`, in which to cache at the indices `where`, (rows, positions).
    `mask` is (B·H, 1, longest), see `KVCache.mask`, or (1, 1, longest) if it is the same for all.
    """
    (kv, keys, values), (rows, positions), dtype = view, where, qkv.dtype
    qkv = qkv.to(kv.dtype)
    kv[rows, :, :, positions] = qkv[:, 1:].transpose(1, 2)  # (B, H, 2, 64)
    queries = qkv[:, 0].reshape(-1, 1, HEAD_SIZE)  # (B·H, 1, 64)
    scores = torch.baddbmm(mask, queries, keys, alpha=HEAD_SIZE**-0.5)  # (B·H, 1, longest)
    return torch.bmm(scores.softmax(-1), values).view(len(qkv), -1).to(dtype)
