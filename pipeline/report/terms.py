"""What the words on the pages mean, one line each. Longer: docs/certificate.md."""

from __future__ import annotations

from pipeline.config.schedule import BUDGET_INVARIANT, BUDGET_PUBLISHED

TERMS = {
    "A": "output of the metric learner, a deep residual network. Its input is the normalized QᵀQ of the whole sequence. Like "
    "the next three it is one d_k by d_k matrix for each layer and head.",
    "A_LM": "metric tensor: iSwiGLU(W A + b) + 1e-9, positive in every entry.",
    "A_P": "potential tensor: A_LM with every entry raised to a learned power.",
    "G_LM": "energy-curvature tensor: a A_P + b_a. Attention scores are Q G_LM Kᵀ / √d_k; with G_LM = identity this is plain "
    "attention.",
    "live, cached": "live: G_LM is computed anew from each input. Cached: one G_LM, computed once, replaces the network that "
    "computes it.",
    "order parameter": "how much a tensor changes with the input: RMS of its difference to that of the first held-out "
    "sequence, over its RMS, all heads together. 0: a constant.",
    "relative deviation": "RMS over the entries of live minus reference G_LM (the cached one; in fp64 the mean over text), "
    "over the head's RMS: the worst head on the worst prompt, in fp64 (before schema 5: RMS over prompts, the "
    "worse of fp32 and fp64).",
    "worst row": "the metric learner is given the rows of one matrix, each by itself; the row, of all there are, that changes "
    "G_LM most. A search finds at least how much, a proof at most.",
    "proven": "for every input of any length, in exact arithmetic, G_LM deviates by less than is allowed. Round-off is apart.",
    "tier": "a name for the relative deviation of G_LM: variant, approximate, invariant, at round-off; or proven, or constant "
    "by construction.",
    "round-off": "a variation of 1e-6 or less, ten times the precision of fp32: fp32 arithmetic cannot tell it from a "
    "constant. The fp64 pass can.",
    "budget": "invariance budget: the sum over steps of learning rate times metric weight decay. It predicts and proves "
    f"nothing: with 8 residual units invariance is expected from {BUDGET_PUBLISHED:g} on, and possible from "
    f"{BUDGET_INVARIANT:g} on; fewer units forget less.",
    "leak gap": "loss with the G_LM of another text, minus loss with the live one. A live G_LM has seen the whole block, and "
    "with it the tokens to be predicted; another text's cannot have. 0: nothing leaks.",
    "attention effect": "by how much the held-out loss is lower than with G_LM = 0 and than with plain attention; in curves "
    "the smaller of the two. 0: attention is dead, and agreement proves nothing.",
    "plain": "G_LM projected on what commutes with the rotation of queries and keys: plain attention with rotated frequencies.",
    "KL": "Kullback-Leibler divergence of the next-token distributions, live from cached, mean over tokens. 0: the same.",
    "top-1 agreement": "share of tokens for which cached and live name the same most likely next token.",
    "greedy agreement": "share of decisions, taken after identical tokens, in which greedy text with KV- and G-cache equals "
    "text without any cache.",
    "block loss": "held-out loss with the live G_LM of each whole block; it may see the future until G_LM is invariant.",
    "cached loss": "held-out loss with one G_LM for all sequences: what a bundle serves, and blind to the future.",
    "nats": "unit of the loss, natural logarithm, per token: 1 nat is 1.44 bits.",
    "loss spike": "a loss far above the median of the last ones (train.spike_threshold), or an order parameter of G_LM ten "
    "times its median.",
    "MFU": "model FLOPs utilization: what the model's arithmetic takes of the devices' peak.",
    "acc": "accuracy: share of the items for which the right answer has the largest log-likelihood; of a free answer, for "
    "which greedy decoding gives it.",
    "acc_norm": "accuracy by the log-likelihood per character of the answer, as lm-evaluation-harness computes it.",
    "acc_bytes": "accuracy by the log-likelihood per byte (UTF-8) of the answer: the papers' byte-length normalization.",
    "mc1, mc2": "TruthfulQA. mc1: accuracy, one true answer among others. mc2: share of the probability that the true "
    "answers get.",
    "perplexity": "exp of the mean negative log-likelihood of an answer; the whole last word, however many tokens it has.",
    "paired standard error": "of a difference on the same items: standard deviation of the items' differences, over the root "
    "of their number. 0: no item differs.",
    "chance": "the score of a model that picks any answer with equal probability.",
    "leak gain": "live score minus cached score of a model that is not certified: what seeing the answer in advance seems to "
    "gain.",
    "fertility": "tokens per word, without the end tokens. Words are what spaces and punctuation separate; in Chinese and "
    "Japanese a character is a word.",
    "packing": "how documents fill sequences of equal length; where they do not, tokens are dropped or padding is added.",
    "shard": "one tar file of documents or of token sequences.",
    "split": "train, val (held out: validation and certificate) or test; a hash of a document's text decides.",
    "near-duplicate": "a document most of whose word sequences are also in another one (MinHash).",
    "fingerprint": "a hash of everything that was made: equal fingerprints, equal data in equal order.",
}


def explained(*names: str) -> list[tuple[str, str]]:
    """These terms with their meaning, in this order."""
    return [(name, TERMS[name]) for name in names]
