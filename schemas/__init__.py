"""What travels on the bus. Plain data; imports nothing of ours.

tokens      packed facts of each token
task        a data row: public and private part
recipe      what to train: tables (section) of keys, those of the loss in algorithm
names       what a name in a recipe stands for
events      what the log holds
trajectory  the state, and `fold`
messages    wake-ups, pointers, signs of life
images      which models see
"""
