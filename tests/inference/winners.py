"""What the small search of these tests is trained on."""

from typing import Final

from tune_bisenet.data.streets import Streets

STREETS: Final = Streets(num_train=8, num_val=6, frame_size=(96, 192))
