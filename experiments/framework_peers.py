"""The trainers that experiments/frameworks.py compares: (training images, test images, epochs, data fields) -> last
test loss.

Images are float32 in [0, 1], [n, 28, 28, 1]. Each trainer follows its framework's documentation.
"""

import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

from configs import vae as config_file
from experiments import launch, speed_peers
from vae_jax.batch import Batch
from vae_jax.run import hosts, session
from vae_jax.steps import jit_train_step, make_eval_step

BATCH, RATE, LATENTS = 128, 1e-3, 20


def ours(train: np.ndarray, test: np.ndarray, epochs: int, fields: dict) -> float:
    """Train with the main program, including all files that it writes; compiled anew. It reads its images itself."""
    config = config_file.get_config().to_dict() | {"epochs": epochs, "batch_size": BATCH}
    config["data"] |= fields
    config["run"] |= {"compilation_cache": False, "likelihood_samples": 0}
    with tempfile.TemporaryDirectory() as folder:
        session.run(config, folder, 0, hosts.Stop)
        return launch.last_test(Path(folder))["test/loss"]


def plain_flax(train: np.ndarray, test: np.ndarray, epochs: int, fields: dict) -> float:
    """Flax's layers and a jitted step that Python calls for each batch, as in Flax's VAE example."""
    model, optimizer = speed_peers.plain_flax("vae"), optax.adam(RATE)
    state, rng = model.state(optimizer), np.random.default_rng(0)
    step, evaluate = jit_train_step(model.objective, optimizer), jax.jit(make_eval_step(model.objective))

    def batch_of(image, rows):
        return Batch(
            image[rows], np.full(len(rows), -1, np.int32), np.ones(len(rows), np.float32), rows.astype(np.int32)
        )

    loss = np.nan
    for _ in range(epochs):
        order = rng.permutation(len(train))
        for start in range(0, len(train) - BATCH + 1, BATCH):
            state, _ = step(state, batch_of(train, order[start : start + BATCH]))
        parts = [np.arange(start, min(start + BATCH, len(test))) for start in range(0, len(test), BATCH)]
        losses = [evaluate(state.variables, batch_of(test, rows), state.key)["loss"] for rows in parts]
        loss = np.concatenate(losses).mean()
    return loss


def as_torch(image: np.ndarray):
    """[n, 28, 28, 1] -> [n, 1, 28, 28]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def loaders(train: np.ndarray, test: np.ndarray):
    """PyTorch loaders of the shuffled training images and of the test images."""
    from torch.utils.data import DataLoader, TensorDataset

    shuffled = DataLoader(TensorDataset(as_torch(train)), BATCH, shuffle=True, drop_last=True)
    return shuffled, DataLoader(TensorDataset(as_torch(test)), BATCH)


def plain_torch(train: np.ndarray, test: np.ndarray, epochs: int, fields: dict) -> float:
    """The training loop of PyTorch's VAE example."""
    import torch

    network = speed_peers.torch_vae()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    shuffled, held_out = loaders(train, test)
    loss = np.nan
    for _ in range(epochs):
        for (image,) in shuffled:
            optimizer.zero_grad()
            network(image, None).backward()
            optimizer.step()
        with torch.no_grad():
            loss = sum(float(network(image, None)) * len(image) for (image,) in held_out) / len(test)
    return loss


def lightning(train: np.ndarray, test: np.ndarray, epochs: int, fields: dict) -> float:
    """PyTorch Lightning's Trainer."""
    import lightning
    import torch

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = speed_peers.torch_vae()

        def training_step(self, batch, index):
            return self.network(batch[0], None)

        def validation_step(self, batch, index):
            self.log("loss", self.network(batch[0], None), batch_size=len(batch[0]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=RATE)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, **quiet)
    trainer.fit(Module(), *loaders(train, test))
    return float(trainer.callback_metrics["loss"])


def pythae(train: np.ndarray, test: np.ndarray, epochs: int, fields: dict) -> float:
    """pythae's TrainingPipeline. Its loss is also half the squared error plus the KL; the test loss takes one more
    evaluation.
    """
    import torch
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder
    from pythae.pipelines import TrainingPipeline
    from pythae.trainers import BaseTrainerConfig
    from torch.nn import functional as F

    network = speed_peers.torch_vae()

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.fc = network.conv1, network.conv2, network.fc

        def forward(self, x):
            mean, logvar = self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).flatten(1)).chunk(2, dim=1)
            return ModelOutput(embedding=mean, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.tconv1, self.tconv2, self.tconv3, self.tconv4 = (getattr(network, f"tconv{i}") for i in range(1, 5))

        def forward(self, z):
            x = F.relu(self.tconv1(z).view(-1, 64, 7, 7))
            x = self.tconv4(F.relu(self.tconv3(F.relu(self.tconv2(x)))))
            return ModelOutput(reconstruction=torch.sigmoid(x))

    model = VAE(VAEConfig((1, 28, 28), LATENTS, reconstruction_loss="mse"), Encoder(), Decoder())
    with tempfile.TemporaryDirectory() as folder:
        options = BaseTrainerConfig(
            folder,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            num_epochs=epochs,
            learning_rate=RATE,
        )
        run = TrainingPipeline(model=model, training_config=options)
        run(as_torch(train), as_torch(test))
        return float(run.trainer.eval_step(epochs))


def keras(train: np.ndarray, test: np.ndarray, epochs: int, fields: dict) -> float:
    """Keras's `fit`, on the backend that KERAS_BACKEND names."""
    import keras
    from keras import layers, ops

    class Sampling(layers.Layer):
        """z = mean + exp(logvar / 2) e; adds the KL to the loss."""

        def __init__(self):
            super().__init__()
            self.seed = keras.random.SeedGenerator(0)

        def call(self, statistics):
            mean, logvar = ops.split(statistics, 2, axis=-1)
            kl = -0.5 * ops.sum(1 + logvar - ops.square(mean) - ops.exp(logvar), axis=-1)
            self.add_loss(ops.mean(kl))
            return mean + ops.exp(logvar / 2) * keras.random.normal(ops.shape(mean), seed=self.seed)

    def half_squared_error(image, again):
        return 0.5 * ops.sum(ops.square(image - again), axis=(1, 2, 3))

    same = {"padding": "same", "activation": "relu"}
    image = keras.Input((28, 28, 1))
    x = layers.Conv2D(64, 3, 2, **same)(layers.Conv2D(32, 3, 2, **same)(image))
    z = Sampling()(layers.Dense(2 * LATENTS)(layers.Flatten()(x)))
    x = layers.Conv2DTranspose(64, 7, 7, **same)(layers.Reshape((1, 1, LATENTS))(z))
    x = layers.Conv2DTranspose(32, 3, 2, **same)(layers.Conv2DTranspose(64, 3, 2, **same)(x))
    again = layers.Conv2DTranspose(1, 3, padding="same", activation="sigmoid")(x)
    model = keras.Model(image, again)
    model.compile(optimizer=keras.optimizers.Adam(RATE), loss=half_squared_error)
    history = model.fit(
        train, train, BATCH, epochs, verbose=0, validation_data=(test, test), validation_batch_size=BATCH
    )
    return history.history["val_loss"][-1]
