"""Says one text with espeak-ng's library, as a program of its own: see data_prep/voices.py.

python -I -S espeak.py LIBRARY DATA VOICE WORDS_A_MINUTE PITCH < text > 16-bit samples, with their rate in Hz on stderr
python -I -S espeak.py LIBRARY DATA VOICE < text > phonemes, a line for each clause

The library keeps state from text to text (phases, flutter, noise) that nothing sets back, so that a text would sound a
little different after another one. A process that ends has none. The calls are those of espeak-ng's speak_lib.h.
"""

import ctypes
import sys

_SYNCHRONOUS, _KEEP_RUNNING, _UTF8, _IPA = 2, 0x8000, 1, 2
_RATE, _PITCH = 1, 3  # parameters
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main(library_path: str, data_path: str, voice: str, *prosody: str) -> None:
    library = ctypes.CDLL(library_path)
    rate_hz = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path.encode(), _KEEP_RUNNING)
    if rate_hz <= 0:
        sys.exit(f"espeak-ng cannot be started with the data in {data_path}; install it again")
    if library.espeak_SetVoiceByName(voice.encode()) != 0:
        sys.exit(f"espeak-ng has no voice {voice}; wanted a language or LANGUAGE+VARIANT, as en-us+m3")
    text = sys.stdin.buffer.read()
    if not prosody:
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        left = ctypes.c_char_p(text)
        while left.value:
            sys.stdout.buffer.write(library.espeak_TextToPhonemes(ctypes.byref(left), _UTF8, _IPA) + b"\n")
        return
    pieces = []

    def receive(samples, num_samples: int, events) -> int:
        if samples and num_samples > 0:
            pieces.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    callback = _CALLBACK(receive)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(ctypes.c_long(1))
    for parameter, value in zip((_RATE, _PITCH), prosody, strict=True):
        library.espeak_SetParameter(parameter, int(value), 0)
    library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 1, 0, _UTF8, None, None)
    sys.stdout.buffer.write(b"".join(pieces))
    sys.stderr.write(str(rate_hz))


if __name__ == "__main__":
    main(*sys.argv[1:])
