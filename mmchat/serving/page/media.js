// Files made ready to be shown to the model: what they are, how large, and their bytes as a data URI.

import { inBytes } from "./dom.js";

const NAMES = { image: "picture", video: "video", audio: "sound" };
// What the server decodes as it is; other pictures and sounds that the browser can read are converted here.
const PICTURES = ["image/jpeg", "image/png", "image/webp", "image/gif"];
const SOUNDS = {
  "audio/wav": "wav",
  "audio/x-wav": "wav",
  "audio/wave": "wav",
  "audio/mpeg": "mp3",
  "audio/mp3": "mp3",
  "audio/flac": "flac",
  "audio/x-flac": "flac",
};
export const SAMPLE_RATE_HZ = 16_000;

let count = 0;

/** A file that cannot be used, with the reason in words. */
export class FileError extends Error {}

/** The shown item of a file. Throws FileError. `model` says what it can see and hear, and its limits. */
export async function readFile(file, model) {
  const kind = file.type.split("/")[0];
  const name = file.name || `${NAMES[kind] ?? "file"}-${count + 1}`;
  if (!NAMES[kind]) throw new FileError(`${name} is neither a picture nor a video nor a sound.`);
  if (!model.modalities.includes(kind)) throw new FileError(`${name}: this model takes no ${NAMES[kind]}s.`);
  const item = await readers[kind](file, name);
  checkSize(item, kind, model.limits);
  return { ...item, kind, id: `m${++count}`, url: URL.createObjectURL(item.blob) };
}

const readers = {
  async image(file, name) {
    // As it is shown: turned as its EXIF says, which is how regions count its pixels.
    const bitmap = await createImageBitmap(file).catch(() => {
      throw new FileError(`${name} cannot be read as a picture.`);
    });
    const { width, height } = bitmap;
    const blob = PICTURES.includes(file.type) ? file : await asPng(bitmap);
    bitmap.close();
    return { blob, name, width, height };
  },
  async video(file, name) {
    return { blob: file, name, seconds: await duration(file) };
  },
  async audio(file, name) {
    const format = SOUNDS[file.type];
    if (format) return { blob: file, name, format, seconds: await duration(file) };
    const wav = await toWav(file).catch(() => {
      throw new FileError(`${name} cannot be read as a sound.`);
    });
    return { ...wav, name: name.replace(/(\.\w+)?$/, ".wav") };
  },
};

async function asPng(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob({ type: "image/png" });
}

/** Length in seconds, or null where the browser cannot tell: the server judges then. */
function duration(file) {
  return new Promise((resolve) => {
    const player = document.createElement("video");
    const url = URL.createObjectURL(file);
    const end = (seconds) => {
      URL.revokeObjectURL(url);
      resolve(Number.isFinite(seconds) ? seconds : null);
    };
    player.preload = "metadata";
    player.onloadedmetadata = () => end(player.duration);
    player.onerror = () => end(null);
    player.src = url;
  });
}

/** Any sound that the browser reads, as a WAV of 16 kHz, one channel, 16 bits: {blob, format, seconds}. */
export async function toWav(blob) {
  const bytes = await blob.arrayBuffer();
  // A context of this rate resamples while it decodes.
  const sound = await new OfflineAudioContext(1, 1, SAMPLE_RATE_HZ).decodeAudioData(bytes);
  if (sound.length === 0) throw new FileError("There is no sound in it.");
  const samples = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((value, i) => (samples[i] += value / sound.numberOfChannels));
  }
  return { blob: wavOf(samples), format: "wav", seconds: sound.duration };
}

function wavOf(samples) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const letters = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  letters(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples.length, true);
  letters(8, "WAVEfmt ");
  view.setUint32(16, 16, true); // length of the format's description
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // channels
  view.setUint32(24, SAMPLE_RATE_HZ, true);
  view.setUint32(28, 2 * SAMPLE_RATE_HZ, true); // bytes a second
  view.setUint16(32, 2, true); // bytes a sample
  view.setUint16(34, 16, true); // bits a sample
  letters(36, "data");
  view.setUint32(40, 2 * samples.length, true);
  samples.forEach((value, i) => view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, value)) * 0x7fff), true));
  return new Blob([view], { type: "audio/wav" });
}

/** Refuses what the server would refuse, before it is sent. */
function checkSize({ blob, name, width, height, seconds }, kind, limits) {
  const refuse = (found, wanted) => {
    throw new FileError(`${name} ${found}; this server takes ${wanted}.`);
  };
  if (blob.size === 0) throw new FileError(`${name} is empty.`);
  const mostBytes = Math.floor(limits.body_bytes * 0.74); // base64 makes four bytes of three
  if (blob.size > mostBytes) refuse(`has ${inBytes(blob.size)}`, `${inBytes(mostBytes)} at most`);
  if (kind === "image") {
    const [short, long] = [Math.min(width, height), Math.max(width, height)];
    const found = `has ${width} × ${height} pixels`;
    if (width * height > limits.image_pixels) refuse(found, `${Number((limits.image_pixels / 1e6).toPrecision(2))} megapixels at most`);
    if (long > limits.image_side) refuse(found, `${limits.image_side} pixels a side at most`);
    if (short < limits.image_min_side) refuse(found, `${limits.image_min_side} pixels a side at least`);
    if (long / short > limits.image_aspect) refuse(found, `pictures up to ${limits.image_aspect} times as long as wide`);
  } else {
    const most = limits[`${kind}_duration_s`];
    if (seconds > most) refuse(`lasts ${Math.round(seconds)} s`, `${most} s at most`);
  }
}

/** Refuses more items of a kind than the server takes in one conversation. */
export function checkCounts(items, limits) {
  for (const [kind, name] of Object.entries(NAMES)) {
    const [found, most] = [items.filter((item) => item.kind === kind).length, limits[`${kind}s`]];
    if (found > most) throw new FileError(`These are ${found} ${name}s; this server takes ${most} in one conversation.`);
  }
}

/** The bytes of an item as a data URI. */
export function dataUri(item) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new FileError(`${item.name} can no longer be read.`));
    reader.readAsDataURL(item.blob);
  });
}
