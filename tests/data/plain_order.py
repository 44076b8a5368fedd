"""The order of samples, written once more from its description with lists and integers: an independent program."""


def philox(seed, epoch, purpose, count, stream=0, window=0):
    """Philox4x64-10 (Salmon et al. 2011) in plain integers."""
    words, mask = [], 2**64 - 1
    block = 0
    while len(words) < count:
        block += 1  # numpy counts up before the first block
        c, k = [block, window, stream, purpose], [seed, epoch]
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [p1 >> 64 ^ c[1] ^ k[0], p1 & mask, p0 >> 64 ^ c[3] ^ k[1], p0 & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


def shuffled(items, words):
    """The items in the order of their words; equal words keep theirs."""
    return [items[i] for i in sorted(range(len(items)), key=lambda i: (words[i], i))]


def laid_out(sizes, window, seed, epoch):
    """(permuted pieces of shards, rotation): the pieces end to end, begun at the rotation, are an epoch's positions."""
    pieces, first = [], 0
    for size in sizes:
        samples = list(range(first, first + size))
        pieces += [samples[cut : cut + window] for cut in range(0, size, window)]
        first += size
    return shuffled(pieces, philox(seed, epoch, 1, len(pieces))), philox(seed, epoch, 2, 1)[0] % first


def plain_epoch(sizes, batch, seed, streams, window, epoch):
    """The global batches of an epoch: pieces, rotation, streams, windows."""
    pieces, rotation = laid_out(sizes, window, seed, epoch)
    laid = [sample for piece in pieces for sample in piece]
    laid = laid[rotation:] + laid[:rotation]
    steps = len(laid) // batch
    length = steps * batch // streams
    rows = []
    for stream in range(streams):
        positions = laid[stream * length : (stream + 1) * length]
        rows.append([])
        for number, cut in enumerate(range(0, length, window)):
            part = positions[cut : cut + window]
            rows[-1] += shuffled(part, philox(seed, epoch, 3, len(part), stream, number))
    share = batch // streams
    return [[sample for row in rows for sample in row[k * share : (k + 1) * share]] for k in range(steps)]
