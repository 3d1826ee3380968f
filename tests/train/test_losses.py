"""The loss counts each token by its own weight, and nothing else."""

import torch

from kvfold.train.losses import next_token_loss


def example():
    torch.manual_seed(0)
    return torch.randn(2, 6, 8), torch.nn.Linear(8, 11, bias=False), torch.randint(0, 11, (2, 6))


def test_it_equals_the_weighted_mean_written_out():
    hidden, head, ids = example()
    weights = torch.tensor([[0.0, 1.0, 0.1, 0.0, 1.0, 0.0], [0.5, 0.0, 0.0, 0.2, 0.0, 1.0]])
    total, share = 0.0, 0.0
    for row in range(2):
        for at in range(1, 6):
            logs = head(hidden[row, at - 1]).log_softmax(-1)
            total -= weights[row, at] * logs[ids[row, at]]
            share += weights[row, at]
    torch.testing.assert_close(next_token_loss(hidden, head, ids, weights).mean, total / share)


def test_a_scored_reply_is_right_when_all_its_tokens_are():
    hidden, head, ids = example()
    weights = torch.zeros(2, 6)
    weights[0, 2], weights[1, 4], weights[1, 5] = 1.0, 0.1, 1.0
    loss = next_token_loss(hidden, head, ids, weights)
    guesses = [int(head(hidden[row, at - 1]).argmax()) == int(ids[row, at]) for row, at in ((0, 2), (1, 5))]
    assert (loss.scored, loss.right) == (2, sum(guesses))


def test_a_token_of_no_weight_gets_no_gradient():
    hidden, head, ids = example()
    hidden.requires_grad_()
    weights = torch.zeros(2, 6)
    weights[0, 3] = 1.0
    next_token_loss(hidden, head, ids, weights).mean.backward()
    touched = hidden.grad.abs().sum(-1) > 0
    assert touched.nonzero().tolist() == [[0, 2]]
