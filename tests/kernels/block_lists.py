"""Lists of blocks for tests: drawn at random, in random order, with places left empty."""

import torch


def random_lists(tile, heads, slots, *, seed=0, empty=True):
    """int32 [B, L, heads, slots]: blocks of the row without repetition; the fifth of each list's places is empty."""
    generator = torch.Generator().manual_seed(seed)
    lists = torch.full((tile.queries.batch, tile.lists, heads, slots), -1, dtype=torch.int32)
    for row, count in enumerate(tile.layout.counts):
        order = torch.rand(tile.lists, heads, max(count, 1), generator=generator).argsort(-1)[..., :slots].int()
        if count:
            lists[row, ..., : order.shape[-1]] = order
    if empty:
        lists[torch.rand(lists.shape, generator=generator) < 0.2] = -1
    return lists


def dense_attention(q, k, v, lists, tile, scale):
    """The definition for autograd, by loops over queries and heads: keys that are seen, then a plain softmax."""
    batch, length, heads, _ = q.shape
    seen = tile.mask.dense(tile.queries, tile.keys)
    ids = tile.layout.ids(tile.keys)
    out, lse = [], []
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                listed = lists[b, t // tile.query_block, h * lists.shape[2] // heads]
                at = (seen[b, t] & torch.isin(ids[b], listed[listed >= 0])).nonzero().squeeze(1)
                g = h * k.shape[2] // heads
                scores = scale * (k[b, at, g] @ q[b, t, h])
                lse.append(scores.logsumexp(0))
                out.append(scores.softmax(0) @ v[b, at, g])
    return torch.stack(out).view(batch, length, heads, -1), torch.stack(lse).view(batch, length, heads)
