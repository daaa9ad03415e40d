"""Trains a recipe; conadv_tf/cli.py has the flags.

python train.py --gin_file=96k_conadv.gin --tpu=v3-512 --data_dir=gs://bucket/imagenet --model_dir=gs://bucket/run
"""

from conadv_tf.cli import main

if __name__ == "__main__":
    main()
