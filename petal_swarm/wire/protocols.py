"""The names of the stream protocols. The number is the version; another one is another protocol."""

VERSION = 1
SESSION = f"/petal-swarm/{VERSION}/session"
PUSH = f"/petal-swarm/{VERSION}/push"
TRAIN = f"/petal-swarm/{VERSION}/train"
TRAIN_PUSH = f"/petal-swarm/{VERSION}/train-push"
DIRECTORY = f"/petal-swarm/{VERSION}/directory"
ADAPTER = f"/petal-swarm/{VERSION}/adapter"
