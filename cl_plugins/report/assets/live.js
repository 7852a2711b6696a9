/* Asks the page's own server for news and takes them in without losing the reader's place. */

const pulse = make("span", "live", "live");
pulse.setAttribute("role", "status");

function place(id, markup) {
  const spot = byId(`place-${id}`), parsed = new DOMParser().parseFromString(markup, "text/html");
  spot.replaceChildren(...parsed.body.childNodes);
}

/* The same choice under its new number. */
function again(label) {
  return PAGE.selections.find((s) => view(s).label === label) ?? PAGE.selections.find((s) => s === state.selection) ?? PAGE.selections[0];
}

function take(news) {
  if (!news.data) return;
  if ((news.panels > 0 && !plots[`panel${news.panels - 1}`]) || (news.confusion && !plots.confusion) || (news.transfer && !plots.transfer) || (news.inside && !plots.inside) || (news.drift && !plots.drift0) || (news.orders && byId("plot-orders").closest("section").hidden)) {
    sessionStorage.setItem("state", JSON.stringify({ ...state, label: view().label, scroll: scrollY }));
    location.reload();
    return;
  }
  const label = view().label, other = state.reference ? view(state.reference).label : "";
  Object.assign(PAGE, news.data);
  views.clear();
  state.selection = again(label);
  state.reference = other && PAGE.selections.find((s) => view(s).label === other) || "";
  for (const [id, markup] of Object.entries(news.html)) place(id, markup);
  document.title = news.title;
  choices();
  references();
  draw();
}

async function follow() {
  await ready;
  byId("selection").closest("nav").append(pulse);
  const kept = JSON.parse(sessionStorage.getItem("state") ?? "null");
  sessionStorage.removeItem("state");
  if (kept) {
    const { label, scroll, ...rest } = kept;
    Object.assign(state, rest);
    state.selection = again(label);
    byId("mode").value = state.mode;
    byId("axis").value = state.axis;
    choices();
    references();
    draw();
    scrollTo(0, scroll);
  }
  for (let stamp = ""; ;) {
    try {
      const answer = await fetch(`/news?stamp=${encodeURIComponent(stamp)}`, { cache: "no-store" });
      if (answer.status === 200) {
        const news = await answer.json();
        stamp = news.stamp;
        take(news);
      }
      pulse.textContent = "live";
      pulse.classList.remove("lost");
    } catch {
      pulse.textContent = "the server is gone, trying again";
      pulse.classList.add("lost");
      await new Promise((resolve) => { setTimeout(resolve, 1000); });
    }
  }
}

follow();
