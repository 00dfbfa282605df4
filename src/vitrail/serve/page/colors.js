// Color maps, and maps painted on a canvas.

// 33 evenly spaced colors of each, interpolated linearly.
const MAGMA = "0000040303110a0822130d331d114628115a36106a430f7650127c5d177f691c817621818226818f2a819c2e7fa9327db63779c33b75cf4170db486ae65163ee5c5ef5695cf9785dfb8761fd9668fea571feb47bfec387fed194fde0a2fceeb0fcfdbf";
const DIVERGING = "0530610e41791752901f63a82a71b23480b93f8ec0529dc86bacd184bcd99bc9e0aed3e6c2ddecd4e6f1e0ecf3ecf2f5f7f6f6f9eee7fbe5d8fddcc9fbccb4f8bb9ef5aa89ee9677e48066db6b55d05548c53e3dba2832ab162a930e267c072267001f";

function palette(hex) {
  const stops = hex.length / 6 - 1, table = new Uint8ClampedArray(256 * 3);
  const channel = (stop, c) => parseInt(hex.slice(stop * 6 + c * 2, stop * 6 + c * 2 + 2), 16);
  for (let i = 0; i < 256; i++) {
    const position = i / 255 * stops, stop = Math.min(Math.floor(position), stops - 1);
    for (let c = 0; c < 3; c++) {
      table[i * 3 + c] = channel(stop, c) + (position - stop) * (channel(stop + 1, c) - channel(stop, c));
    }
  }
  return table;
}

const TABLES = {false: palette(MAGMA), true: palette(DIVERGING)};

// The ends of the scale; in a signed one 0 is in the middle, and a few pixels may exceed the ends.
export function range(map, signed) {
  const values = map.flat();
  if (!signed) return [Math.min(...values), Math.max(...values)];
  const sizes = values.map(Math.abs).sort((a, b) => a - b), most = sizes.at(values.length > 256 ? Math.floor(.98 * values.length) : -1);
  return [-most, most];
}

// In signed maps, small values are transparent, so that the picture below shows through.
export function paint(canvas, map, signed, [low, high] = range(map, signed), veil = false) {
  const table = TABLES[Boolean(signed)];
  canvas.width = map[0].length;
  canvas.height = map.length;
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  map.flat().forEach((value, i) => {
    const level = Math.max(0, Math.min(255, Math.round(255 * (value - low) / (high - low || 1))));
    for (let c = 0; c < 3; c++) image.data[i * 4 + c] = table[level * 3 + c];
    image.data[i * 4 + 3] = signed && veil ? Math.min(255, 3 * Math.abs(level - 127.5)) : 255;
  });
  context.putImageData(image, 0, 0);
}

export const paintRamp = (canvas, signed) => paint(canvas, [Array.from({length: 256}, (_, i) => i)], signed, [0, 255]);
