"""``payfold bench``: each figure of ours beside what the machine can do at most, and beside the plain alternative.

Note [Only ratios travel]
    A machine's rates change by the hour and by its neighbours. So a figure and its limit are measured in turns, each
    pair gives a ratio, and it is the median of those that is quoted. What is measured absolutely is for orientation.
"""
