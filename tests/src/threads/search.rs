//! The search for an order of what was done in which the specification gives the same outcomes.

use super::{Event, Got, Op, Small, WINDOW, settled};
use abi::Error;
use abi::page::Pool;
use spec::state::{Content, Phase};
use spec::{Call, Outcome, step};

/// A vCPU or a VM that is claimed.
const BUSY: Got = Got::Outcome(Outcome::Refused(Error::Busy));

/// The search for an order.
pub(super) struct Search<'a> {
    pub(super) story: &'a [Event],
}

impl Search<'_> {
    /// The states after all orders that give the outcomes of the story.
    pub(super) fn ends(&self, state: Small) -> Vec<Small> {
        let mut ends = Vec::new();
        self.go_on(state, &mut vec![false; self.story.len()], &mut ends);
        ends
    }

    fn go_on(&self, state: Small, done: &mut Vec<bool>, ends: &mut Vec<Small>) {
        if done.iter().all(|done| *done) {
            if !ends.contains(&state) {
                ends.push(state);
            }
            return;
        }
        let first_end = self.open(done).filter_map(|event| event.ended).map(|(end, _)| end).min();
        for (number, event) in self.story.iter().enumerate() {
            if done[number] || first_end.is_some_and(|end| event.began > end) {
                continue;
            }
            // A vCPU that waits for an unshare is entered in two steps: others may see what lies between.
            let entered = settled(&state, event.op, event.vcpu);
            if entered != state && event.ended.is_some_and(|(_, got)| got != BUSY) {
                self.go_on(entered, done, ends);
            }
            if let Some(next) = self.next(&state, event) {
                done[number] = true;
                self.go_on(next, done, ends);
                done[number] = false;
            }
        }
    }

    fn open<'a>(&'a self, done: &'a [bool]) -> impl Iterator<Item = &'a Event> {
        self.story.iter().zip(done).filter(|(_, done)| !**done).map(|(event, _)| event)
    }

    /// The state after an event that comes next, if its outcome is what the specification says.
    fn next(&self, state: &Small, event: &Event) -> Option<Small> {
        let (_, got) = event.ended?;
        if got == BUSY && self.is_claimed(event) {
            return Some(*state);
        }
        let state = &settled(state, event.op, event.vcpu);
        match (event.op, got) {
            (Op::Load { pfn }, got) => {
                let page = &state.pages[pfn as usize];
                let fits = match got {
                    Got::Value(value) if page.host_state().is_accessible() => match page.content {
                        Content::Zeros => value == 0,
                        Content::Known => true,
                        Content::Secret => false,
                    },
                    Got::Value(_) => false,
                    Got::Outcome(_) => !page.host_state().is_accessible(),
                };
                fits.then_some(*state)
            }
            (Op::Enter { vm, vcpu }, Got::Outcome(got)) => {
                let (outcome, next) = step(&WINDOW, state, Call::UnshareAck { vm, vcpu }, None);
                let waits = state.vms[usize::from(vm)].pending[usize::from(vcpu)].is_some();
                let live = state.vms[usize::from(vm)].phase == Phase::Live;
                let fits = match (got, outcome) {
                    (Outcome::NotServed, _) => !live,
                    (Outcome::Lacking(_) | Outcome::Refused(_), _) => false,
                    (Outcome::InvalidParameter, Outcome::Done(0)) => true,
                    _ if waits => got == outcome,
                    // Nothing was pending: the guest finds the answer of an earlier call.
                    _ => live,
                };
                fits.then_some(next)
            }
            (Op::Call(call), Got::Outcome(got)) => {
                let (outcome, next) = step(&WINDOW, state, call, self.lack(call, got));
                (outcome == got).then_some(next)
            }
            (_, Got::Value(_)) => None,
        }
    }

    /// The pool that a call may lack pages of, if it says so. The stage has given all pools more than two calls can
    /// use: only a VM that was made since has none, and its donation lacks them.
    fn lack(&self, call: Call, got: Outcome) -> Option<Pool> {
        let made = |event: &Event| match event.ended {
            Some((_, Got::Outcome(Outcome::Created(vm)))) => Some(vm),
            _ => None,
        };
        let is_new = call.vm().is_some_and(|vm| self.story.iter().any(|event| made(event) == Some(vm)));
        (is_new && got == Outcome::Lacking(Pool::Vm)).then_some(Pool::Vm)
    }

    /// Whether a call that came to nothing because a vCPU was claimed had somebody to claim it meanwhile, who did
    /// not come to nothing for the same reason. The specification knows no claims: its calls take no time.
    fn is_claimed(&self, event: &Event) -> bool {
        let wanted = match event.op {
            Op::Call(Call::VmTeardownStart { vm }) => Some((vm, None)),
            op => op.claims(event.vcpu).map(|(vm, vcpu)| (vm, Some(vcpu))),
        };
        let Some((vm, vcpu)) = wanted else { return false };
        self.story.iter().filter(|other| other.cpu != event.cpu).any(|other| {
            let at_once = other.began < event.ended.map_or(usize::MAX, |(end, _)| end)
                && event.began < other.ended.map_or(usize::MAX, |(end, _)| end);
            let claims =
                other.op.claims(other.vcpu).filter(|_| other.ended.is_none_or(|(_, got)| got != BUSY));
            at_once && claims.is_some_and(|claims| claims.0 == vm && vcpu.is_none_or(|vcpu| vcpu == claims.1))
        })
    }
}
