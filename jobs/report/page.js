"use strict";
// One loupe for each painting: the place that is pointed at in one whole picture, at full
// resolution in all of them. Pictures are decoded when first pointed at, those of one painting at a
// time; where that fails the crops stay.
{
  let release = () => {};

  for (const painting of document.querySelectorAll(".painting")) {
    const panes = [...painting.querySelectorAll(".pane")];
    const panels = [...painting.querySelectorAll(".whole")].map((frame, i) => ({
      frame, pane: panes[i], box: frame.querySelector(".box"),
      canvas: panes[i].querySelector("canvas"), still: panes[i].querySelector("img"),
      height: +frame.dataset.height, width: +frame.dataset.width,
      reduction: +frame.dataset.reduction, bitmap: null,
    }));
    const [outY, outX] = ["y", "x"].map((name) => painting.querySelector("output." + name));
    const reset = painting.querySelector(".reset");
    const home = { y: +outY.value, x: +outX.value };
    let place = { ...home }, held = false, loading = false, waiting = false;

    const free = () => {
      for (const panel of panels) {
        panel.bitmap?.close();
        panel.bitmap = null;
      }
      loading = false;
      goHome();
    };

    const load = () => {
      if (loading) return;
      release();
      release = free;
      loading = true;
      painting.classList.add("loading");
      const decoded = panels.map(async (panel) => {
        const picture = new Image();
        picture.src = panel.frame.dataset.full;
        await picture.decode();
        const bitmap = await createImageBitmap(picture);
        if (loading) panel.bitmap = bitmap; else bitmap.close();
        show();
      });
      Promise.allSettled(decoded).then(() => painting.classList.remove("loading"));
    };

    const mark = () => {
      for (const { box, pane, height, width } of panels) {
        const side = pane.clientWidth;
        box.style.top = 100 * (place.y - side / 2) / height + "%";
        box.style.left = 100 * (place.x - side / 2) / width + "%";
        box.style.height = 100 * side / height + "%";
        box.style.width = 100 * side / width + "%";
      }
      outY.value = place.y;
      outX.value = place.x;
    };

    const show = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        mark();
        const away = place.y !== home.y || place.x !== home.x;
        for (const { pane, canvas, bitmap, reduction } of panels) {
          canvas.hidden = !(bitmap && away);
          if (canvas.hidden) continue;
          const side = canvas.width = canvas.height = Math.ceil(pane.getBoundingClientRect().width);
          const corner = [place.x, place.y].map((centre) => (centre - (side >> 1)) / reduction);
          const extent = side / reduction;
          canvas.getContext("2d").drawImage(bitmap, ...corner, extent, extent, 0, 0, side, side);
        }
        reset.hidden = !away;
      });
    };

    const goHome = () => {
      place = { ...home };
      hold(false);
      show();
    };

    const hold = (value) => {
      held = value;
      painting.classList.toggle("held", held);
    };

    const moveTo = (y, x) => {
      const { height, width } = panels[1];
      const within = (value, most) => Math.min(Math.max(Math.floor(value), 0), most - 1);
      place = { y: within(y, height), x: within(x, width) };
      load();
      show();
    };

    for (const { frame, height, width } of panels) {
      const point = (event) => {
        const area = frame.getBoundingClientRect();
        moveTo((event.clientY - area.top) / area.height * height,
               (event.clientX - area.left) / area.width * width);
      };
      frame.addEventListener("pointermove", (event) => {
        if (event.pointerType === "mouse" && !held) point(event);
      });
      frame.addEventListener("click", (event) => {
        hold(!held || event.pointerType !== "mouse");
        point(event);
      });
      frame.addEventListener("keydown", (event) => {
        const way = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!way) return;
        event.preventDefault();
        hold(true);
        const stride = panels[0].pane.clientWidth / 4;
        moveTo(place.y + way[0] * stride, place.x + way[1] * stride);
      });
    }
    reset.addEventListener("click", goHome);
    addEventListener("resize", show);
    mark();
  }
}
