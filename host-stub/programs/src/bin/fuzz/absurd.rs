//! Calls that can never be right: they must be refused, and change nothing.

use abi::host::{CALLS, FIRST};
use abi::smccc::{INVALID_PARAMETER, NOT_SUPPORTED};
use abi::{Exit, HostCall, VmHandle};
use host_programs::deed::Answer;
use host_programs::{Failure, failure};
use spec::state::Phase;

use crate::play::{P, Play, V};
use crate::tell::Deed;

/// A slot of which no VM is made here.
const NO_SLOT: u8 = 201;
/// Page numbers beyond any address.
const NO_PAGE: u64 = 1 << 36;

impl Play<'_> {
    /// A host's call with at least one word that nothing can make right.
    pub(crate) fn absurd_host_call(&mut self) -> Result<(), Failure> {
        let words = self.absurd_words();
        self.tale.note(Deed::AbsurdHost(words));
        let before = self.state;
        let answer = self.deed.answer(words)?;
        let known = CALLS.iter().any(|call| u64::from(call.number) == words[0]);
        let refused = match answer {
            Answer::NotSupported => !known,
            Answer::Served(result) => known && result.outcome.is_err(),
            Answer::Strange(..) => false,
        };
        if !refused {
            return Err(failure!("an absurd call came to {answer}: {words:x?}"));
        }
        self.look_at_changes(&before)
    }

    fn absurd_words(&mut self) -> [u64; 7] {
        let dice = &mut self.chooser.dice;
        let random = [dice.next(), dice.next(), dice.next(), dice.next(), dice.next(), dice.next()];
        let [a, b, c, d, e, f] = random;
        let vm = u64::from(NO_SLOT) | (a % 0xffff + 1) << 8;
        let pfn = NO_PAGE.saturating_add(a);
        let pages = if b & 1 == 0 { 0 } else { NO_PAGE | c };
        let page = self.world.pfn + d % P as u64;
        let number = |call: HostCall| {
            let [number, ..] = call.encode();
            number
        };
        let nobody = VmHandle::from_word(1 << 8).expect("a handle can be so");
        let (gfn, call) = (self.world.gfn, dice.below(12));
        match call {
            0 => {
                // No call has such a number, also with the hint that is not part of it.
                let number = u64::from(FIRST) + 0x30 + e % 0xc0;
                [number | (f & 1) << 16, a, b, c, d, e, f]
            }
            1 => [u64::from(e as u32) & !(1 << 30 | 1 << 16), a, b, c, d, e, f],
            2 => [
                number(HostCall::PoolTopUp { pool: abi::page::Pool::Tables, pfn: 0, pages: 0 }),
                d % 3,
                page,
                pages,
                0,
                e,
                f,
            ],
            3 => [number(HostCall::ShareHyp { pfn: 0, pages: 0 }), pfn, b, c, d, e, f],
            4 => [number(HostCall::UnshareHyp { pfn: 0, pages: 0 }), page, pages, c, d, e, f],
            5 => [
                number(HostCall::DonateGuest { vm: nobody, pfn: 0, gfn: 0, pages: 0 }),
                vm,
                page,
                gfn,
                1,
                e,
                f,
            ],
            6 => [number(HostCall::ReclaimGuest { vm: nobody, gfn: 0, pages: 0 }), vm, gfn, pages, d, e, f],
            7 => [number(HostCall::QueryPage { pfn: 0 }), pfn, b, c, d, e, f],
            8 => [number(HostCall::VcpuRun { vm: nobody, vcpu: 0, values: [0; 4] }), vm, b, c, d, e, f],
            9 => [number(HostCall::VmTeardownFinish { vm: nobody }), vm, b, c, d, e, f],
            10 => [number(HostCall::TestPin { pfn: 0 }), pfn, b, c, d, e, f],
            // A VM of the window, and a vCPU that it has not or that has its entry already.
            _ => {
                let vm = self.handle((d % V as u64) as u8).to_word();
                let vcpu = if f & 1 == 0 { e % 2 } else { 9 + e };
                [number(HostCall::VcpuSetBoot { vm: nobody, vcpu: 0, pc: 0, x0: 0 }), vm, vcpu, a, b, c, d]
            }
        }
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
