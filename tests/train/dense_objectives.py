"""The objectives written out: one row at a time, a dense mask, full logits, torch's cross entropy, loops."""

import math

import torch
import torch.nn.functional as F


def documents_of(row, length, lengths, document_lengths):
    """[(start, end)] of the documents of a row."""
    if document_lengths is None:
        return [(0, length if lengths is None else int(lengths[row]))]
    ends = document_lengths[row].cumsum(0).tolist()
    return [(end - n, end) for n, end in zip(document_lengths[row].tolist(), ends, strict=True) if n]


def dense_mask(documents, length, *, objective, block_size=None, clean="block_causal", reach=None):
    """bool [S, S] and int64 positions [S]; what is in no document sees itself alone."""
    where = {i: (d, i - start) for d, (start, end) in enumerate(documents) for i in range(start, end)}
    halves = 2 if objective == "bd3lm" else 1
    visible = torch.eye(halves * length, dtype=torch.bool)
    for q in range(halves * length):
        for k in range(halves * length):
            if q % length not in where or k % length not in where:
                continue
            (document_q, at_q), (document_k, at_k) = where[q % length], where[k % length]
            if document_q != document_k:
                seen = False
            elif objective != "bd3lm":
                seen = reach is None or at_k < at_q + 1 + reach
            elif q < length:
                same, before = (
                    at_q // block_size == at_k // block_size,
                    at_k // block_size < at_q // block_size,
                )
                seen = same if k < length else before
            else:
                past = at_k <= at_q if clean == "causal" else at_k // block_size <= at_q // block_size
                seen = k >= length and past
            visible[q, k] = seen or q == k
    position = torch.tensor([where.get(i, (0, 0))[1] for i in range(length)]).repeat(halves)
    return visible, position


def weight_of(kind, schedule, t, i, masked, document, p):
    if kind == "uniform":
        return 1.0
    if kind == "cart":
        visible = [j for j in range(*document) if j not in masked]
        return sum(0.5 * p * (1 - p) ** (abs(i - j) - 1) for j in visible)
    if schedule == "linear":
        return 1 / t
    return math.pi / 2 * math.sin(math.pi / 2 * (1 - t)) / math.cos(math.pi / 2 * (1 - t))


def inverse_time(schedule, t):
    """t' with 1 - alpha(t') = alpha(t)."""
    return 1 - t if schedule == "linear" else 1 - 2 / math.pi * math.acos(1 - math.cos(math.pi / 2 * (1 - t)))


def dense_loss(
    model, ids, labels, noise, *, objective, mask_id, block_size=None, lengths=None, document_lengths=None,
    schedule="linear", loss_weight_type="scheduler", loss_norm_type="token", shift=False, bos_id=None,
    bar_mask_token=False, complementary=False, certainty_weight=0.0, certainty_temperature=1.0, reach=None,
    clean="block_causal", ar_weight=0.0, cart_p=0.3, normalizer=None,
):  # fmt: skip
    """The loss, with gradient, and the sums of a LossOutput."""
    views = 2 if complementary else 1
    any_bos = shift and document_lengths is None and bool((labels[:, 0] != -100).any())
    terms, next_ce, entropies = [], [], []  # terms: (weight, ce, maskable positions of the document)
    sums = {"nll_sum": 0.0, "ce_sum": 0.0, "tokens": 0, "masked": 0}
    sequences = maskable_total = 0
    for r in range(len(ids)):
        row, label = ids[r].tolist(), labels[r].tolist()
        documents = documents_of(r, len(row), lengths, document_lengths)
        if any_bos:
            starts = label[0] != -100 and documents[0][1] > 0
            row, label = ([bos_id, *row], [-100, *label]) if starts else ([*row, bos_id], [*label, -100])
            documents = [(0, documents[0][1] + starts)]
        if shift and document_lengths is not None:
            for start, _ in documents:
                label[start] = -100
        length, sequences = len(row), sequences + len(documents)
        visible, position = dense_mask(
            documents, length, objective=objective, block_size=block_size, clean=clean, reach=reach
        )
        for view in range(views):
            maskable = [i for start, end in documents for i in range(start, end) if label[i] != -100]
            masked = {i for i in maskable if bool(noise.masked[r, i]) != bool(view)}
            inputs = [mask_id if i in masked else token for i, token in enumerate(row)]
            inputs = inputs + row if objective == "bd3lm" else inputs
            logits = model(
                input_ids=torch.tensor([inputs]), attention_mask=visible[None, None],
                position_ids=position[None], use_cache=False,
            ).logits[0]  # fmt: skip
            if bar_mask_token:
                assert mask_id == logits.shape[1] - 1
                logits = logits[:, :mask_id]
            maskable_total += len(maskable) if view == 0 else 0
            sums["tokens"] += len(maskable)
            sums["masked"] += len(masked)
            for start, end in documents:
                of_document = sum(start <= i < end for i in maskable)
                for i in range(start, end):
                    if ar_weight and view == 0 and i > start and label[i] != -100:
                        next_ce.append(F.cross_entropy(logits[length + i - 1], torch.tensor(label[i])))
                    if i not in masked:
                        continue
                    source = i - shift
                    if shift and objective == "bd3lm" and (i - start) % block_size == 0:
                        source = length + i - 1
                    t = float(noise.t[r, i])
                    t = inverse_time(schedule, t) if view else t
                    ce = F.cross_entropy(logits[source], torch.tensor(label[i]))
                    weight = weight_of(loss_weight_type, schedule, t, i, masked, (start, end), cart_p)
                    terms.append((weight, ce, of_document))
                    sums["ce_sum"] += ce.item()
                    sums["nll_sum"] += weight_of("scheduler", schedule, t, i, masked, None, None) * ce.item()
                    if int(logits[source].argmax()) == label[i]:
                        p = torch.softmax(logits[source] / certainty_temperature, dim=0)
                        entropies.append(torch.special.entr(p).sum())
    own = maskable_total if loss_norm_type == "token" else sequences
    divisor = (own if normalizer is None else normalizer) * views
    loss = 0.0 * sum(p.sum() for p in model.parameters())
    for weight, ce, of_document in terms:
        loss = loss + weight * ce / (of_document if loss_norm_type == "sequence" else 1) / divisor
    if next_ce:
        loss = loss + ar_weight * torch.stack(next_ce).mean()
    if certainty_weight and entropies:
        share = 1 if normalizer is None else own / normalizer
        loss = loss + certainty_weight * share * torch.stack(entropies).mean()
    return loss, sums
