"""What is good. One reward, one file: `async reward(task, trajectory, run)`; knows no actor, no bus, no tools.

reward      the seam: what a reward is given and gives
registry    names to rewards
answer      finds the final answer in a turn's text
exact       the answer equals the expected one, as text or as a number
math        the answer is mathematically equal (math-verify, in a sandbox)
repo_tests  the submitted patch makes the tests pass; trial runs them, in a sandbox
"""
