//! Calls that can never be right: they must be refused, and change nothing.
//!
//! The host's are those of `abi::host::CALLS`, each argument chosen by what it is called there, so a new call is
//! tried as soon as it is listed. TEST_FAIL is never made: it breaks the hypervisor on purpose.

use abi::host::{CALLS, CallInfo, FIRST, HostResult};
use abi::smccc::{INVALID_PARAMETER, NOT_SUPPORTED};
use abi::tables::refusals;
use abi::{Error, Exit};
use host_programs::deed::Answer;
use host_programs::{Failure, failure};
use spec::state::{Phase, VCPUS};

use crate::play::{G, P, Play, V};
use crate::tell::Deed;

/// A slot of which no VM is made here.
const NO_SLOT: u64 = 201;
/// A bit of a handle: no slot is used so often that its generation has it.
const NO_GENERATION: u64 = 1 << 31;
/// vCPUs of a VM: the first index that none can have.
const NO_VCPU: u64 = 8;
/// Page numbers beyond any address.
const NO_PAGE: u64 = 1 << 36;
/// Page numbers beyond a guest's 40 bits.
const NO_GUEST_PAGE: u64 = 1 << 28;
/// A bit that no small number has: a word of which only the lower half were read would be right.
const HIGH: u64 = 1 << 32;
/// In one of so many calls all pages and records are counted, which takes as long as twenty calls.
const COUNTED: u64 = 32;
/// Function ids that host calls may have.
const NUMBERS: u32 = 0x100;

impl Play<'_> {
    /// A host's call with at least one word that nothing can make right.
    pub(crate) fn absurd_host_call(&mut self) -> Result<(), Failure> {
        let words = self.absurd_words()?;
        self.tale.note(Deed::AbsurdHost(words));
        let counted = self.chooser.dice.below(COUNTED) == 0;
        let before = if counted { self.deed.census()? } else { None };
        let answer = self.deed.answer(words)?;
        let call = CALLS.iter().find(|call| u64::from(call.number) == words[0]);
        let is_refused = match (answer, call) {
            (Answer::NotSupported, None) => true,
            (Answer::Served(result), Some(call)) => is_refusal_of(call, result),
            _ => false,
        };
        let name = call.map_or("no call", |call| call.name);
        if !is_refused {
            return Err(failure!("an absurd call ({name}) came to {answer}: {words:x?}"));
        }
        let after = if counted { self.deed.census()? } else { None };
        if before != after {
            return Err(failure!("an absurd call ({name}) changed {before:x?} to {after:x?}: {words:x?}"));
        }
        let state = self.state;
        self.look_at_changes(&state)
    }

    fn absurd_words(&mut self) -> Result<[u64; 7], Failure> {
        match self.chooser.dice.below(8) {
            0 => Ok(self.words_of_no_call()),
            _ => self.absurd_call(),
        }
    }

    /// Registers with a function id that no host call has.
    fn words_of_no_call(&mut self) -> [u64; 7] {
        let dice = &mut self.chooser.dice;
        let mut words = [(); 7].map(|()| dice.next());
        words[0] = if dice.below(2) == 0 {
            // In their range, also with the hint that is not part of it.
            let is_free = |number: &u32| CALLS.iter().all(|call| call.number != *number);
            let free = || (FIRST..FIRST + NUMBERS).filter(is_free);
            let number = free().nth(dice.below(free().count() as u64) as usize).unwrap_or(0);
            u64::from(number) | dice.below(2) << 16
        } else {
            // An SMC32 function.
            u64::from(dice.next() as u32) & !(1 << 30 | 1 << 16)
        };
        words
    }

    /// A listed call, of whose arguments at least one is absurd; the others may be right.
    fn absurd_call(&mut self) -> Result<[u64; 7], Failure> {
        let calls = || CALLS.iter().filter(|call| call.name != "TEST_FAIL" && can_be_refused(call));
        let chosen = self.chooser.dice.below(calls().count() as u64) as usize;
        let Some(call) = calls().nth(chosen) else { return Err(failure!("there are no calls")) };

        let mut absurd = [None; 6];
        for (word, name) in absurd.iter_mut().zip(call.arguments) {
            *word = self.absurd_word(call, name);
        }
        let choices = || (0..).zip(&absurd).filter(|(_, word)| word.is_some()).map(|(at, _)| at);
        let choice = self.chooser.dice.below((choices().count() as u64).max(1)) as usize;
        let Some(certain) = choices().nth(choice) else {
            return Err(failure!(
                "{} can be refused, and no argument of it is known to be absurd",
                call.name
            ));
        };
        let mut words = [(); 7].map(|()| self.chooser.dice.next());
        words[0] = call.number.into();
        for (at, (word, name)) in words[1..].iter_mut().zip(call.arguments).enumerate() {
            let right = self.right_word(name);
            let is_absurd = self.chooser.dice.below(4) == 0 || at == certain;
            *word = absurd[at].filter(|_| is_absurd).unwrap_or(right);
        }
        Ok(words)
    }

    /// A word for an argument with which a call cannot succeed, whatever the others are; `None` if there is none.
    fn absurd_word(&mut self, call: &CallInfo, argument: &str) -> Option<u64> {
        let (right, image, gone) = (self.right_word(argument), self.image, self.handle_that_is_gone());
        let dice = &mut self.chooser.dice;
        let any = dice.next();
        Some(match argument {
            "vm" => {
                let other_slot = NO_SLOT | (any % 0xff_ffff + 1) << 8;
                dice.pick(&[0, right & 0xff, other_slot, right ^ NO_GENERATION, right | HIGH, gone])
            }
            "vcpu" => dice.pick(&[NO_VCPU, NO_VCPU + 1, NO_VCPU.saturating_add(any), right | HIGH, u64::MAX]),
            // Of the hypervisor's own pages a host may ask whose they are.
            "pfn" if is_question(call) => dice.pick(&[NO_PAGE, right | NO_PAGE, any | NO_PAGE, u64::MAX]),
            "pfn" => dice.pick(&[image, NO_PAGE, right | NO_PAGE, any | NO_PAGE, u64::MAX]),
            "root" => dice.pick(&[right | 1, image, right | NO_PAGE, any | NO_PAGE, u64::MAX]),
            "gfn" => dice.pick(&[NO_GUEST_PAGE, right | NO_GUEST_PAGE, right | NO_PAGE, u64::MAX]),
            "pages" => dice.pick(&[0, right | 1 << 52, any | NO_PAGE, u64::MAX]),
            "pool" => dice.pick(&[2, 3, right | HIGH, any | 2, u64::MAX]),
            "flags" => right | dice.pick(&[8, HIGH, 1 << 63, !7]),
            "permissions" => right | dice.pick(&[4, HIGH, 1 << 63, !3]),
            "register" => dice.pick(&[63, right | HIGH, any | HIGH, u64::MAX]),
            // A VM gets an entry once, and each VM here has one.
            "pc" => any,
            _ => return None,
        })
    }

    /// A word for an argument that may be right.
    fn right_word(&mut self, argument: &str) -> u64 {
        let vm = self.a_handle();
        let (pfn, gfn) = (self.world.pfn, self.world.gfn);
        let dice = &mut self.chooser.dice;
        match argument {
            "vm" => vm,
            "vcpu" => dice.below(VCPUS as u64),
            "pfn" => pfn + dice.below(P as u64),
            "root" => (pfn + dice.below(P as u64)) & !1,
            "gfn" => gfn + dice.below(G as u64),
            "pages" => 1 + dice.below(3),
            "pool" => dice.below(2),
            "flags" => dice.below(8),
            "permissions" => dice.below(4),
            "register" => dice.below(35),
            _ => dice.next(),
        }
    }

    /// The handle of a VM of this program that has ended; one that nobody has if none has.
    fn handle_that_is_gone(&self) -> u64 {
        let mut gone = self.handles.iter().zip(&self.guests).filter(|(_, guest)| guest.is_none());
        gone.find_map(|(handle, _)| *handle).unwrap_or_else(|| self.handle(V as u8)).to_word()
    }

    /// The handle of a VM that is there; one that nobody has if there is none.
    fn a_handle(&mut self) -> u64 {
        let there = self.guests.iter().filter(|guest| guest.is_some()).count() as u64;
        let chosen = self.chooser.dice.below(there.max(1)) as usize;
        let guest = self.guests.iter().flatten().nth(chosen);
        guest.map_or(self.handle(V as u8), |guest| guest.handle).to_word()
    }

    /// A guest's call of the same kind.
    pub(crate) fn absurd_guest_call(&mut self) -> Result<(), Failure> {
        let vm = self.chooser.dice.below(V as u64) as u8;
        let Some(vcpu) = self.idle_vcpu(vm) else { return Ok(()) };
        if self.state.vms[usize::from(vm)].phase != Phase::Live {
            return Ok(());
        }
        let protected = self.state.vms[usize::from(vm)].protected;
        let dice = &mut self.chooser.dice;
        let (a, b, c) = (dice.next(), dice.next(), dice.next());
        let memory_call = 0xc600_0003 + dice.pick(&[0, 1, 4, 5, 6]);
        let inside = self.world.gfn << 12;
        let (command, expected) = match dice.below(5) {
            0 => ([0xc600_000c + a % 0x30, b, c, a], NOT_SUPPORTED),
            1 => ([0x8600_0010 + a % 0x40, b, c, a], NOT_SUPPORTED),
            2 => ([memory_call, inside | (a % 0xfff + 1), 1, 0], INVALID_PARAMETER),
            3 => ([memory_call, inside, 1, a | 1], INVALID_PARAMETER),
            _ => ([memory_call, inside, 1 << 40 | b, 0], INVALID_PARAMETER),
        };
        let expected = if protected { expected } else { NOT_SUPPORTED };
        self.tale.note(Deed::AbsurdGuest { vm, words: command });
        let before = self.state;
        let exit = self.enter(vm, vcpu, command)?;
        match exit {
            Exit::GuestCall { arguments: [_, answer, ..] } if answer == expected => {
                self.look_at_changes(&before)
            }
            _ => Err(failure!(
                "an absurd call of VM {vm}: {command:x?} came to {exit:x?}, and should to {expected:#x}"
            )),
        }
    }
}

/// Whether there is anything that a call is refused for.
fn can_be_refused(call: &CallInfo) -> bool {
    refusals(call.name).is_some_and(|errors| !errors.is_empty())
}

/// Whether a call only looks: it is refused for what is no page number at all.
fn is_question(call: &CallInfo) -> bool {
    refusals(call.name) == Some(&[Error::Invalid])
}

/// Whether a call was refused as its documents say. Pages cannot be what an absurd call lacks.
fn is_refusal_of(call: &CallInfo, result: HostResult) -> bool {
    let [first, second, ..] = result.values;
    let is_listed =
        |error| error != Error::NoMemory && refusals(call.name).is_some_and(|all| all.contains(&error));
    result.outcome.is_err_and(is_listed) && [first, second] == [0; 2]
}
