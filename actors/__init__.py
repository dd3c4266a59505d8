"""Who does the work: the roles, what joins them to the bus, and the command line.

Pure, one file a role: dispatcher, generator, toolbox, scorer, learner, recorder. Joined to the bus by process (hops),
dispatching, training, recording, roles (what each is given). Kept alive by supervisor; started by replica, train, cli.
"""
