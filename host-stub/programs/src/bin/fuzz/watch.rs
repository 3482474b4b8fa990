//! Looks at pages of the window: whose they are by the hypervisor's test calls, whether the kernel's loads and stores
//! reach them, and what is in them.

use abi::HostCall;
use guest_stub::protocol::player::RET;
use host_programs::deed::{Answer, Touch};
use host_programs::{Failure, failure};
use spec::State;
use spec::state::{Content, HostEntry, Page};

use crate::play::{G, P, Play, V};

/// Words of each page that are played with, by their offsets.
pub(crate) const OFFSETS: [u64; 4] = [0, 8, 0x800, 0xff8];
/// The one that holds an instruction to fetch, or zero.
pub(crate) const CODE_SLOT: usize = 1;

/// What the words of a page hold.
pub(crate) type Words = [u64; OFFSETS.len()];

/// What was asked about a page, by places in the series.
#[derive(Clone, Copy)]
struct Look {
    page: usize,
    state: usize,
    query: Option<usize>,
    load: usize,
    store: Option<usize>,
}

impl Play<'_> {
    /// A slot and a value for a store: where instructions may be fetched it is one.
    pub(crate) fn dice_touch(&mut self) -> (usize, u64) {
        let slot = self.chooser.dice.below(OFFSETS.len() as u64) as usize;
        let value = self.chooser.dice.next();
        (slot, if slot == CODE_SLOT { value << 32 | u64::from(RET) } else { value })
    }

    /// Address of a word of a page of the window.
    pub(crate) fn address(&self, page: usize, slot: usize) -> u64 {
        ((self.world.pfn + page as u64) << 12) + OFFSETS[slot]
    }

    /// What is in pages that have become zeros.
    pub(crate) fn forget_wiped(&mut self) {
        for (page, words) in self.state.pages.iter().zip(&mut self.content) {
            if page.content == Content::Zeros {
                *words = [0; OFFSETS.len()];
            }
        }
    }

    /// Looks at the pages that are no longer as they were, and at one more in turn.
    pub(crate) fn look_at_changes(&mut self, before: &State<P, V, G>) -> Result<(), Failure> {
        self.turn = self.turn.wrapping_add(1);
        let turn = self.turn;
        let state = self.state;
        self.look(turn, false, |page| page == turn % P || state.pages[page] != before.pages[page])
    }

    /// Looks at all pages in all ways, and at the count of aborts.
    pub(crate) fn look_at_all(&mut self) -> Result<(), Failure> {
        self.turn = self.turn.wrapping_add(1);
        self.look(self.turn, true, |_| true)?;
        let answer = self.deed.call(HostCall::TestCounters)?;
        let counted = answer.ok().map(|result| result.values[0]);
        let expected = self.aborts_at_start + self.aborts;
        if counted == Some(expected) {
            return Ok(());
        }
        Err(failure!("the hypervisor has injected {counted:?} aborts, and there were {expected}"))
    }

    fn look(&mut self, turn: usize, closely: bool, wanted: impl Fn(usize) -> bool) -> Result<(), Failure> {
        let slot = turn % OFFSETS.len();
        let mut looks = [None; P];
        self.series.clear();
        for (page, look) in looks.iter_mut().enumerate().filter(|(page, _)| wanted(*page)) {
            let pfn = self.world.pfn + page as u64;
            let open = self.state.pages[page].host_state().is_accessible();
            let state = self.series.call(HostCall::TestPage { pfn });
            let query = closely.then(|| self.series.call(HostCall::QueryPage { pfn }));
            let address = self.address(page, slot);
            let load = self.series.load(address);
            let store = (closely && !open).then(|| self.series.store(address, !0));
            *look = Some(Look { page, state, query, load, store });
        }
        self.deed.series(self.series)?;
        looks.into_iter().flatten().try_for_each(|look| self.judge(slot, look))
    }

    /// What TEST_PAGE must say of such a page: host's state, owner, VM, guest page, whether EL2 maps it.
    fn words_of(&self, page: &Page) -> [u64; 5] {
        let (vm, gfn) = match page.host {
            HostEntry::Guest { vm, gfn } => (self.handle(vm).to_word(), self.world.gfn + u64::from(gfn)),
            _ => (0, 0),
        };
        [page.host_state() as u64, page.owner() as u64, vm, gfn, u64::from(page.mapped_at_el2())]
    }

    /// Whether the hypervisor is in the first of two states and not in the second, by the first page of which they say
    /// different things. An error if there is no such page.
    pub(crate) fn is_in(&self, one: &State<P, V, G>, other: &State<P, V, G>) -> Result<bool, Failure> {
        let mut pages = (0..).zip(one.pages.iter().zip(&other.pages));
        let different = pages.find(|(_, (one, other))| self.words_of(one) != self.words_of(other));
        let Some((page, (one, _))) = different else {
            return Err(failure!("no page tells the states apart"));
        };
        let answer = self.deed.call(HostCall::TestPage { pfn: self.world.pfn + page })?;
        Ok(words(answer) == Some(self.words_of(one)))
    }

    fn judge(&mut self, slot: usize, look: Look) -> Result<(), Failure> {
        let page = self.state.pages[look.page];
        let differs = |what: &str, real: &dyn core::fmt::Display, expected: &dyn core::fmt::Display| {
            failure!(
                "page {} ({:?}): {what}: {real}, and the specification says {expected}",
                look.page,
                page.host
            )
        };
        let expected = self.words_of(&page);
        let real = self.series.answer(look.state);
        if words(real) != Some(expected) {
            return Err(differs(
                "host's state, owner, VM, guest page, EL2",
                &Shown(words(real)),
                &Shown(Some(expected)),
            ));
        }
        if let Some(query) = look.query {
            let real = self.series.answer(query).ok().map(|result| [result.values[0], result.values[1]]);
            if real != Some([page.host_state() as u64, 1]) {
                return Err(differs("QUERY_PAGE", &Shown(real), &Shown(Some(expected))));
            }
        }
        let open = page.host_state().is_accessible();
        let load = self.series.touched(look.load);
        let at = self.address(look.page, slot);
        match load {
            Touch::Done(value) if open => {
                let expected = self.content[look.page][slot];
                if value != expected {
                    let (real, expected) = (Touch::Done(value), Touch::Done(expected));
                    return Err(differs("the host reads it", &real, &expected));
                }
            }
            touch if !open && touch.is_injected_abort(at) => self.aborts += 1,
            touch => return Err(differs("the host reads it", &touch, &open)),
        }
        match look.store.map(|store| self.series.touched(store)) {
            None => Ok(()),
            Some(touch) if touch.is_injected_abort(at) => {
                self.aborts += 1;
                Ok(())
            }
            Some(touch) => Err(differs("the host writes it", &touch, &"an abort")),
        }
    }
}

/// What TEST_PAGE says.
fn words(answer: Answer) -> Option<[u64; 5]> {
    answer.ok().and_then(|result| result.values.first_chunk::<5>().copied())
}

/// Words in hexadecimal.
struct Shown<const N: usize>(Option<[u64; N]>);

impl<const N: usize> core::fmt::Display for Shown<N> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match &self.0 {
            Some(words) => write!(f, "{words:x?}"),
            None => f.write_str("refused"),
        }
    }
}
