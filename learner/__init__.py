"""How it learns: samples are packed, their log-probabilities recomputed, and one optimizer step is made.

Read in the order of the data:

    samples.py        a scored trajectory as arrays
    groups.py         which groups carry a signal
    pack.py           samples as the rows of a few micro-batches; a group's prompt is computed once
    logprobs.py       what the policy says of the sampled tokens now
    advantages.py     how much better a member was than its group
    losses.py         what is minimised, token by token
    policy.py         the model and its optimizer: one step, weights out
    checkpoints.py    state on disk, all or nothing
    conversations.py  demonstrations as tokens
    supervised.py     the cold start before version 0

An algorithm is a pure function of advantages.py or losses.py.
"""
