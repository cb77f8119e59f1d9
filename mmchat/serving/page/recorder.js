// The microphone: what is said between two presses of a button, as a WAV.

import { FileError, toWav } from "./media.js";

const REASONS = {
  NotAllowedError: "The browser was not allowed to use the microphone. Allow it beside the address, then try again.",
  NotFoundError: "No microphone was found.",
  NotReadableError: "The microphone is in use by another program.",
};

/** One recording. `await Recording.start()`, then `finish()` for {blob, format, seconds}, or `discard()`. */
export class Recording {
  /** Throws FileError where there is no microphone or it may not be used. */
  static async start() {
    if (!navigator.mediaDevices?.getUserMedia) {
      throw new FileError("The browser records only on https pages and on localhost. Open the page there, or attach a file.");
    }
    const recording = new Recording();
    try {
      recording.stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      throw new FileError(REASONS[error.name] ?? `The microphone cannot be used: ${error.message}`);
    }
    recording.pieces = [];
    recording.recorder = new MediaRecorder(recording.stream);
    recording.recorder.ondataavailable = ({ data }) => recording.pieces.push(data);
    recording.recorder.start();
    recording.startedAt = performance.now();
    return recording;
  }

  get seconds() {
    return (performance.now() - this.startedAt) / 1000;
  }

  async finish() {
    await this.discard();
    const blob = new Blob(this.pieces, { type: this.recorder.mimeType });
    return toWav(blob).catch(() => {
      throw new FileError("Nothing was recorded. Is the microphone on?");
    });
  }

  /** Stops, and gives the microphone back. */
  async discard() {
    if (this.recorder.state !== "inactive") {
      const stopped = new Promise((resolve) => (this.recorder.onstop = resolve));
      this.recorder.stop();
      await stopped;
    }
    for (const track of this.stream.getTracks()) track.stop();
  }
}
