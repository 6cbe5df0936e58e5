"""Causal attention over sequences of different lengths, and dropout.

Letters in shape comments: B sequences, T positions in each of them, H attention heads of 64, N rows in all.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

MOST_SEQUENCES = 2**15  # in one attention on a GPU; CUDA has no kernel for 2**16 and more
BLOCK = 128  # queries in a block on a CPU: smaller ones make slower products, larger ones more weights that causality masks
# The most weights (B·H·T²) that one attention of several blocks on a CPU keeps for its backward pass, 0.4 GB in float32 for
# each layer; of more, the backward pass computes them again.
MOST_KEPT = 2**26


def dropout(x, rate):
    """Returns x with each element zero with probability `rate` (to within 2**-17), and the others scaled up accordingly.

    On a CPU, PyTorch draws one number for each element; here 16 bits of its generator decide each, several times faster.
    """
    if rate == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    threshold = min(round(rate * 2**16), 2**16 - 1)  # of the 2**16 values that an element's bits can have, so many drop it
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, threshold - 2**15, out=torch.empty_like(x, requires_grad=False))  # 1 or 0, in x's dtype at once
    return x * kept.mul_(2**16 / (2**16 - threshold))


def attend(qkv, rate=0.0):
    """Returns causal attention with dropout of its weights, as PyTorch's scaled_dot_product_attention does.

    Args:
        qkv: (B, T, 3, H, 64), the queries, keys and values of B sequences.
        rate: of dropout.

    Returns:
        (B, T, H, 64).
    """
    if qkv.device.type == "cuda" and len(qkv) > MOST_SEQUENCES:
        return torch.cat([attend(part, rate) for part in qkv.split(MOST_SEQUENCES)])
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, 64) each
    if rate == 0 or qkv.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, dropout_p=rate, is_causal=True).transpose(1, 2)
    # PyTorch's own attention on CPUs has no fast path with dropout
    shape, length = queries.shape, queries.shape[2]
    queries, keys, values = (each.flatten(0, 1) for each in (queries, keys, values))  # (B·H, T, 64)
    is_kept = length <= BLOCK or len(queries) * length**2 <= MOST_KEPT
    blocks = []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        # sliced just before its block: the backward pass then adds up and frees the slices' gradients block by block
        block = queries[:, start:end], keys[:, :end], values[:, :end], rate
        # recomputed: with the dropout of the first time, by the state of the generator that it had then
        blocks.append(_attend_block(*block) if is_kept else recomputed(_attend_block, *block, use_reentrant=False))
    attended = torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]  # the byte-level decoder's needs no copy
    return attended.view(shape).transpose(1, 2)  # (B·H, T, 64) -> (B, H, T, 64) -> (B, T, H, 64)


def _attend_block(queries, keys, values, rate):
    """Returns the attention (B·H, t, 64) of a block's t queries to the U keys up to its end; query i sees the first U-t+i+1.

    Args:
        queries: (B·H, t, 64).
        keys, values: (B·H, U, 64).
        rate: of dropout.
    """
    num_queries, num_keys = queries.shape[1], keys.shape[1]
    later = queries.new_full((num_queries, num_keys), -torch.inf).triu(num_keys - num_queries + 1)  # (t, U)
    scores = torch.baddbmm(later, queries, keys.transpose(1, 2), alpha=queries.shape[-1] ** -0.5)  # (B·H, t, U)
    return dropout(scores.softmax(-1), rate) @ values


class Ragged:
    """Sequences of different lengths as rows (N, ·), one sequence after another: no work is done for padding.

    Only attention sees them as sequences, padded to lengths that follow from their own, so that the numbers of one do not
    depend on the others. The shortest come first: those that are padded alike are neighbours.

    Args:
        lengths: int (B,), patches of each sequence; 0 = none.
        device: where the rows are.

    Attributes:
        sequence, position: int64 (N,), which sequence each row is of, and its place in that.
        starts: int64 (B,), the first row of each sequence.
    """

    def __init__(self, lengths, device):
        lengths = np.asarray(lengths, dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        ends = lengths[order].cumsum()  # (B,), rows up to and with each sequence, in their order
        starts = np.empty_like(ends)
        starts[order] = ends - lengths[order]
        sequence = order.repeat(lengths[order])
        position = np.arange(len(sequence)) - starts[sequence]
        self.sequence, self.position, self.starts = (torch.from_numpy(a).to(device) for a in (sequence, position, starts))
        self._groups = []  # (slice of rows, (sequences, their padded length), int64 index of each row among the padded ones)
        padded = np.array([padded_length(length) for length in lengths[order].tolist()], dtype=np.int64)
        for length in np.unique(padded[padded > 0]).tolist():
            members = np.flatnonzero(padded == length)
            rows = slice(int(starts[order[members[0]]]), int(ends[members[-1]]))
            member = np.arange(len(members)).repeat(lengths[order[members]])  # each row's sequence, by its index in the group
            cells = torch.from_numpy(member * length + position[rows]).to(device)
            self._groups.append((rows, (len(members), length), cells))

    def attend(self, qkv, rate=0.0):
        """Returns each row's attention (N, H, 64) to the rows of its sequence up to itself; see `attend`.

        Args:
            qkv: (N, 3, H, 64), queries, keys and values.
            rate: of dropout of the attention's weights.
        """
        attended = []
        for rows, shape, cells in self._groups:
            group = qkv[rows]  # (n, 3, H, 64)
            is_full = len(group) == shape[0] * shape[1]
            if not is_full:
                padding = group.new_zeros(shape[0] * shape[1], *group.shape[1:])
                group = padding.index_copy(0, cells, group)
            outputs = attend(group.view(*shape, *qkv.shape[1:]), rate).flatten(0, 1)  # (B·T, H, 64)
            attended.append(outputs if is_full else outputs.index_select(0, cells))
        return torch.cat(attended)


def padded_length(length):
    """Returns what a sequence is padded to for its attention: at most 15 more, or a quarter of its length."""
    step = max(16, 1 << (max(length - 1, 4).bit_length() - 3))  # from an eighth to a quarter of the length
    return -(-length // step) * step
