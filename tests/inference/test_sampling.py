"""How tokens are chosen: samples follow the softmax, and the repetition penalty is that of transformers."""

import torch

from utils.inference.sampling import Sampling


def test_sampling_follows_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).expand(4000, 4)
    rows, counts = torch.arange(4000), torch.zeros(4000, dtype=torch.int64)
    chosen = Sampling(temperature=2.0).choose(logits, None, rows, counts)
    shares = torch.bincount(chosen, minlength=4) / 4000
    assert (shares - (logits[0] / 2).softmax(0)).abs().max() < 0.025
    assert set(Sampling(1.0, top_k=2).choose(logits, None, rows, counts).tolist()) == {2, 3}
    assert set(Sampling(1.0, top_p=0.7).choose(logits, None, rows, counts).tolist()) == {2, 3}
    assert Sampling().choose(logits, None, rows, counts).eq(3).all()


def test_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits, ids = torch.randn(3, 9), torch.randint(0, 9, (3, 4))
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits.clone()).argmax(-1)
    seen = torch.zeros(3, 9, dtype=torch.bool).scatter_(1, ids, True)
    chosen = Sampling(repetition_penalty=1.7).choose(logits, seen, torch.arange(3), torch.zeros(3).long())
    assert chosen.equal(expected)
