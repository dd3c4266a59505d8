"""How it learns: samples are packed, their log-probabilities recomputed, and one optimizer step is made.

Read in the order of the data:

    samples.py        a scored trajectory as arrays
    groups.py         which groups are trained
    pack.py           samples as the rows of a few micro-batches; a group's prompt is computed once
    attention.py      each token sees its own past, and no neighbour in the row
    images.py         what stands at the places of images
    logprobs.py       what the policy says of the sampled tokens now
    advantages.py     how much better a member was than its group
    credit.py         which turn earned it
    batch.py          a step's groups as one array per quantity, by token
    corrections.py    what is done about tokens that another policy sampled
    losses.py         what is minimised, token by token
    aggregation.py    how the losses of tokens become one number
    objective.py      the loss that a recipe amounts to, and what is measured of it
    combination.py    whether a recipe's keys fit together, and the loss as one line
    models.py         models as folders; a reference, a teacher, a value head
    lora.py           adapters instead of all weights
    policy.py         the model and its optimizer: one step, weights out
    saved.py          a checkpoint as read, and found to fit
    checkpoints.py    state on disk, all or nothing
    ranks.py          the processes of one learner: what one says all hear, and when one dies all die
    orders.py         what rank 0 tells the others
    deepspeed_policy.py   a policy that they hold together, by ZeRO
    conversations.py  demonstrations as tokens
    supervised.py     the cold start before version 0

An algorithm is a pure function of advantages.py, credit.py, corrections.py or losses.py.
"""
