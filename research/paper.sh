#!/usr/bin/env bash
# The runs of the paper's tables, in the order of their dependencies, on a machine with eight GPUs: see docs/reproduce.md.
set -euo pipefail

bt() { torchrun --nproc-per-node 8 -m bridgetower "$@"; }
base="--vision towers/clip-vit-base-patch16 --text towers/roberta-base"
large="--vision towers/clip-vit-large-patch14 --text towers/roberta-large"
meter="--model.fusion.bridge None --model.fusion.no-input-norm"

# Data and towers
bridgetower prepare coco --source originals/coco --out data/coco
bridgetower prepare vg --source originals/vg --out data/vg
bridgetower prepare pairs originals/sbu --test-fraction 0 --validation-fraction 0 --max-errors 1000 --out data/sbu
bridgetower prepare pairs originals/cc3m --test-fraction 0 --validation-fraction 0 --max-errors 1000 --out data/cc3m
bridgetower prepare flickr30k --source originals/flickr30k --out data/flickr30k
bridgetower prepare vqav2 --source originals/vqav2 --out data/vqav2
bridgetower prepare vgqa --source originals/vg --answers data/vqav2 --karpathy originals/coco/dataset_coco.json --out data/vgqa
bridgetower prepare snli-ve --source originals/snli-ve --out data/snli-ve
bridgetower prepare nlvr2 --source originals/nlvr2 --out data/nlvr2

# From the official checkpoints
official=checkpoints/BridgeTower_ftfpt_base
bt evaluate ${official}_vqav2.ckpt vqav2 --data data/vqav2 --split test --tokenizer towers/roberta-base --answers data/vqav2/answers.json --out found/official-vqav2
bt evaluate ${official}_snlive.ckpt snli-ve --data data/snli-ve --split test --tokenizer towers/roberta-base --out found/official-snli-ve
bt evaluate ${official}_nlvr2.ckpt nlvr2 --data data/nlvr2 --split test1 --tokenizer towers/roberta-base --out found/official-nlvr2
bt evaluate ${official}_irtr_itm_itc_f30k.ckpt retrieval --data data/flickr30k --protocol paper --tokenizer towers/roberta-base --out found/official-flickr30k
bt evaluate ${official}_irtr_itm_itc_coco.ckpt retrieval --data data/coco --candidates 256 --protocol paper --tokenizer towers/roberta-base --out found/official-coco
bridgetower convert checkpoints/BridgeTower_pt_base.ckpt towers/bridgetower-base --to bridgetower --tokenizer towers/roberta-base

# Pre-training
pairs="--data.folders data/coco --data.train-only data/vg data/sbu data/cc3m"
bt train pretrain-base $base $pairs --out runs/pretrain-base
bt train pretrain-large $large $pairs --out runs/pretrain-large
bt train pretrain-base $base $meter $pairs --out runs/pretrain-meter

# VQAv2
vqa="--data.folders data/vqav2 --data.train-splits train validation --task.protocol paper"
bt train vqav2-base --init runs/pretrain-base/last $vqa --data.train-only data/vgqa --out runs/vqav2-base
bt train vqav2-large --init runs/pretrain-large/last $vqa --data.train-only data/vgqa --out runs/vqav2-large
bt train vqav2-base --init runs/pretrain-meter/last $vqa --data.train-only data/vgqa --out runs/vqav2-meter
for run in base large meter; do
  bt evaluate runs/vqav2-$run/last vqav2 --data data/vqav2 --split test --out found/vqav2-$run
done

# SNLI-VE and NLVR2
bt train snli-ve --init runs/pretrain-base/last --data.folders data/snli-ve --out runs/snli-ve
bt train nlvr2 --init runs/pretrain-base/last --data.folders data/nlvr2 --out runs/nlvr2
for split in validation test; do bt evaluate runs/snli-ve snli-ve --data data/snli-ve --split $split --out found/snli-ve-$split; done
for split in validation test1; do bt evaluate runs/nlvr2 nlvr2 --data data/nlvr2 --split $split --out found/nlvr2-$split; done

# Retrieval
flickr="--data.folders data/flickr30k --data.train-splits train validation"
bt train retrieval-flickr30k --init runs/pretrain-base/last $flickr --out runs/flickr30k
bt evaluate runs/flickr30k/last retrieval --data data/flickr30k --protocol paper --out found/flickr30k
bt train retrieval-flickr30k --init runs/pretrain-meter/last $flickr --out runs/flickr30k-meter
bt evaluate runs/flickr30k-meter/last retrieval --data data/flickr30k --protocol paper --out found/flickr30k-meter
bt train retrieval-coco --init runs/pretrain-base/last --data.folders data/coco --out runs/coco
bt evaluate runs/coco/last retrieval --data data/coco --candidates 256 --protocol paper --out found/coco-5k
bt evaluate runs/coco/last retrieval --data data/coco --candidates 256 --protocol paper --fold-size 1000 --out found/coco-1k
bt train retrieval-flickr30k-ranking --init runs/pretrain-base/last $flickr --out runs/flickr30k-ranking
bt evaluate runs/flickr30k-ranking/last retrieval --data data/flickr30k --out found/flickr30k-ranking

# ManagerTower
bt train pretrain-base $base --model.fusion.bridge adaptive_manager --model.fusion.layer-embeddings $pairs --out runs/pretrain-managers
bt train vqav2-base --init runs/pretrain-managers/last --optimizer.lr 9e-6 --optimizer.weight-decay 0.06 --optimizer.warmup 0.1 --batch-size 504 $vqa --out runs/vqav2-managers
bt evaluate runs/vqav2-managers/last vqav2 --data data/vqav2 --split test --out found/vqav2-managers

# Ablations
for bridge in add scaled_add interpolate concatenate gated norm; do
  bt train vqav2-base-no-pretraining $base --model.fusion.bridge $bridge $vqa --out runs/vqav2-$bridge
  bt evaluate runs/vqav2-$bridge/last vqav2 --data data/vqav2 --split test-dev --out found/vqav2-$bridge
  bt train retrieval-flickr30k $base --model.fusion.bridge $bridge $flickr --out runs/flickr30k-$bridge
  bt evaluate runs/flickr30k-$bridge/last retrieval --data data/flickr30k --protocol paper --out found/flickr30k-$bridge
done
bt train vqav2-base-no-pretraining $base $meter $vqa --out runs/vqav2-meter-no-pretraining

for layers in 2 3 4 8 10 12; do
  bt train vqav2-base-no-pretraining $base --model.fusion.num-layers $layers $vqa --out runs/vqav2-layers-$layers
  bt train vqav2-base-no-pretraining $base --model.fusion.num-layers $layers $meter $vqa --out runs/vqav2-meter-layers-$layers
done
bt train vqav2-base-no-pretraining $base --model.fusion.vision-layers 1 2 3 4 5 6 --model.fusion.text-layers 1 2 3 4 5 6 $vqa --out runs/vqav2-lowest
bt train vqav2-base-no-pretraining $base --model.fusion.vision-layers 2 4 6 8 10 12 --model.fusion.text-layers 2 4 6 8 10 12 $vqa --out runs/vqav2-every-second
bt train vqav2-base-no-pretraining $base --model.fusion.separate-projections $vqa --out runs/vqav2-projections
for vision in clip-vit-base-patch32 deit_base.pth vit_base.pth; do
  bt train vqav2-base-no-pretraining --vision towers/$vision --text towers/roberta-base $vqa --out runs/vqav2-${vision%.*}
  bt train vqav2-base-no-pretraining --vision towers/$vision --text towers/roberta-base $meter $vqa --out runs/vqav2-meter-${vision%.*}
done
bt train vqav2-base-no-pretraining --vision towers/clip-vit-base-patch16 --text towers/bert-base-uncased $vqa --out runs/vqav2-bert
bt train vqav2-large-no-pretraining $large $vqa --out runs/vqav2-large-no-pretraining

# The towers after pre-training
own=examples/single_tower.py
for task in cifar10 cifar100; do
  python $own $task originals/cifar data/$task
  bridgetower train $task --task-spec $own:${task^^} --extensions $own --init runs/pretrain-base/last --data.folders data/$task --data.train-splits train validation --out runs/$task
  bridgetower evaluate runs/$task/last $task --task-spec $own:${task^^} --extensions $own --data data/$task --out found/$task
done
for task in cola mrpc sst2 qqp stsb rte qnli mnli; do
  python $own $task originals/glue data/$task
  bridgetower train $task --task-spec $own:${task^^} --extensions $own --init runs/pretrain-base/last --data.folders data/$task --out runs/$task
  bridgetower evaluate runs/$task $task --task-spec $own:${task^^} --extensions $own --data data/$task --split validation --out found/$task
done
