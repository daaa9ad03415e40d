"""Reproduces a table or figure of the paper; conadv_tf/experiments/reproduce.py has the flags.

python reproduce.py --table=1 --scale=digits
"""

from conadv_tf.experiments.reproduce import main

if __name__ == "__main__":
    main()
