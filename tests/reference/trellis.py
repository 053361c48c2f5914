"""Twin of the trellis code: strings of bits and a search over all states, step by step. Numpy only, nothing of ours."""

import numpy as np

TILE = 256
EXCLUDED = 2**50


def value(state):
    """147.7 times the weight."""
    return sum((state * 0x83DCD12D % 2**32).to_bytes(4, "little")) - 510


def end(i, rate):
    return (i + 1) * rate // 8


def shift(i, rate):
    return end(i % TILE, rate) - end(i % TILE - 1, rate)


def states_of(words, states):
    """The state of each element of one tile, from its words."""
    rate = len(words)
    string = "".join(f"{int(w) & 0xFFFFFFFF:032b}" for w in words)
    return [int((string + string)[len(string) + end(i, rate) - states :][:states], 2) for i in range(TILE)]


def pack(chosen, rate):
    bits = "".join(f"{x % 2 ** shift(i, rate):0{shift(i, rate)}b}" for i, x in enumerate(chosen))
    words = [int(bits[b : b + 32], 2) for b in range(0, len(bits), 32)]
    return np.array(words, dtype=np.uint32).view(np.int32)


def decode(words, states):
    return np.array([value(x) for x in states_of(words, states)], dtype=np.float32) * np.float32(1 / 147.7)


def target(w):
    """Twice the weight in whole numbers of 1 / 147.7."""
    near = np.clip(np.asarray(w, dtype=np.float32), -100, 100)  # whose product is finite, and beyond the limit as well
    return np.clip(np.rint(near * np.float32(295.4)), -4080, 4080).astype(np.int64)


def cost(chosen, t):
    v = np.array([value(x) for x in chosen])
    return int((v * v - v * t).sum())


def search(t, rate, states, first, steps, pinned=None):
    """The cheapest states of the elements ``first ...``; ties go to the lower predecessor and the lower last node."""
    v = np.array([value(x) for x in range(2**states)])
    state = np.arange(2**states)
    node_cost = np.zeros(2 ** (states - shift(first, rate)), dtype=np.int64)
    if pinned is not None:
        node_cost[:] = EXCLUDED
        node_cost[pinned] = 0
    tops = []
    for i in range(first, first + steps):
        state_cost = node_cost[state >> shift(i, rate)] + v * v - v * t[i % TILE]
        by_node = state_cost.reshape(2 ** shift(i + 1, rate), -1)  # [the bits that are forgotten, the node]
        tops.append(by_node.argmin(axis=0))
        node_cost = by_node.min(axis=0)
    node = int(node_cost.argmin()) if pinned is None else pinned
    chosen = []
    for i in reversed(range(first, first + steps)):
        chosen.append((int(tops.pop()[node]) << (states - shift(i + 1, rate))) + node)
        node = chosen[-1] >> shift(i, rate)
    return chosen[::-1]


def encode(w, rate, states, window):
    """Words of one tile."""
    t = target(w)
    seam = search(t, rate, states, TILE - window, 2 * window)[window] >> shift(0, rate)
    return pack(search(t, rate, states, 0, TILE, seam), rate)
