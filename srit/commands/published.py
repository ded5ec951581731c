"""The data sets that `srit data` fetches from the Hub: where they lie, at which commit, their licences.

Checksums are those that several independent projects have published for these files; a split without
one is pinned by its commit alone.
"""

from dataclasses import dataclass, field

from srit.data.sources import source_files
from srit.runtime.files import InputError, sha256


@dataclass(frozen=True)
class Published:
    """name: OWNER/NAME; configs: all of them are read; sha256: of a split's file, where it is known."""

    name: str
    revision: str
    licence: str
    configs: tuple[str, ...] = ("",)
    sha256: dict[str, str] = field(default_factory=dict)

    def sources(self, split: str) -> list[str]:
        """The split as --train_file would name it, once for each config."""
        return [f"{'/'.join(filter(None, (self.name, config)))}@{self.revision}:{split}"
                for config in self.configs]

    def fetch(self, split: str) -> list[str]:
        """As `sources`, with the checksum verified. Raises InputError for other bytes."""
        for source in self.sources(split) if split in self.sha256 else ():
            for file in source_files(source):
                if (found := sha256(file)) != self.sha256[split]:
                    raise InputError(f"{file}: its SHA-256 is {found}, not {self.sha256[split]}; "
                                     f"delete it and ask again, or name another with --input")
        return self.sources(split)


PUBLISHED = {
    "gsm8k": Published("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", "MIT", ("main",), {
        "train": "ea82612ea9582142387730c793eb67d3b12849002bc0b7fa6f8efafa7351419d",
        "test": "ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59"}),
    "svamp": Published("ChilleD/SVAMP", "5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef", "MIT"),
    "asdiv": Published("EleutherAI/asdiv", "8f95807222d87b4c688c3c22a6ba2801e1fa03e2", "CC BY-NC 4.0",
                       ("asdiv",), {
        "validation": "79dbad6536fe3e8cd449e67da859d7a6f5ac0d8f852efe563742ca5faee7fb75"}),
    "math": Published("EleutherAI/hendrycks_math", "21a5633873b6a120296cce3e2df9d5550074f4a3", "MIT",
                      ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
                       "number_theory", "prealgebra", "precalculus")),
    "aqua": Published("deepmind/aqua_rat", "33301c6a050c96af81f63cad5562cb5363e88971", "Apache-2.0",
                      ("raw",)),
    "csqa": Published("tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155", "MIT", ("",), {
        "train": "b0449767ed986bfc2ca52b1244a46ef12f732756727f3cb0a4ab69ac8b3d282b",
        "validation": "bdbd9bf9cc4d2349b24901038b2ab2f58e10e4e507ad2fd425dca55cd3cb6660"}),
    "obqa": Published("allenai/openbookqa", "388097ea7776314e93a529163e0fea805b8a6454", "not stated",
                      ("main",), {
        "train": "98148f8a54e62eb862346a75192d5fb824d6cbb68f2f59aecd793d39ecb5cd8b",
        "validation": "35370b9cfee8c1ff325ccc74adc434d12c47ca0ac3244aa87f3fa77069285206",
        "test": "cd5483e366daa230c1c87bbdc512d8b7229f14f6dd04d19fc8b1a3855aaaa8a3"}),
    "arc": Published("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "CC BY-SA 4.0",
                     ("ARC-Challenge",), {
        "train": "e488c1587ffdcfc8443f916c53488a95cd471c5790e0746c6bfe4cecf20962cb",
        "validation": "395a5c88d1580d69855fbaee9450270578df1ad5af6259771cd0a42c20e99f05",
        "test": "62f03257e737aed263f55c6abf87c7bb0028a44a6bdd2a26eb1279eb42c1d1e9"}),
    "piqa": Published("baber/piqa", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1", "not stated"),
    "mmlu": Published("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "MIT", ("all",), {
        "test": "74a41822ce7d3def56e1682f958469c04642a5336a5ce912fa375fdb90fb25d7"}),
}
