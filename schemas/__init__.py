"""What travels on the bus. Plain data; imports nothing of ours.

tokens      packed facts of each token
task        a data row: public and private part
recipe      what to train
events      what the log holds
trajectory  the state, and `fold`
messages    wake-ups, pointers, signs of life
"""
