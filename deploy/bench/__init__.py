"""``payfold bench``: each figure against the machine's limit, and against the plain alternative.

Note [Only ratios travel]
    A machine's rates change by the hour and with its neighbours. So a figure and its limit are measured in turns. Each
    pair gives a ratio, and the median of these ratios is quoted. Absolute figures are for orientation only.
"""
