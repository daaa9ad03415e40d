"""python train.py --gin_file=96k_conadv.gin --tpu=v3-512 --data_dir=gs://… --model_dir=gs://…"""

from conadv_tf.cli import main

if __name__ == "__main__":
    main()
