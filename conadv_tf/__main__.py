"""`python -m conadv_tf` is `python train.py`, wherever the package is installed."""

from conadv_tf.cli import main

if __name__ == "__main__":
    main()
