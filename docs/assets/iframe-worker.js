// The search of the site runs in a worker. Browsers start no workers for pages that are opened as files, so there a
// hidden frame stands in for one: it runs the same script, and messages are handed over as events.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.srcdoc = "<!doctype html>";
      this.ready = new Promise((resolve) => {
        frame.addEventListener("load", () => {
          const inner = frame.contentWindow;
          inner.postMessage = (data) => this.receive(data);
          inner.importScripts = (...urls) => urls.reduce((done, next) => done.then(() => run(inner, next)), Promise.resolve());
          run(inner, url).then(() => resolve(inner));
        }, { once: true });
      });
      document.body.append(frame);
      this.frame = frame;
    }

    postMessage(data) {
      this.ready.then((inner) => inner.dispatchEvent(new inner.MessageEvent("message", { data })));
    }

    receive(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      this.onmessage?.(event);
    }

    terminate() {
      this.frame.remove();
    }
  }

  const run = (inner, url) => new Promise((resolve, reject) => {
    const script = inner.document.createElement("script");
    script.src = url;
    script.onload = resolve;
    script.onerror = reject;
    inner.document.head.append(script);
  });

  window.IFrameWorker = IFrameWorker;
  window.Worker = IFrameWorker;
}
