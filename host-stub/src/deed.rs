//! `/dev/deed`: the research device. It lets a program act as a hostile host kernel.
//!
//! Every argument is an array of 64-bit words that is read and written back. What a program does here can
//! break the host's own books; it cannot break what Deed promises, and that is what it is for.

use abi::host::{CALL_WORDS, RESULT_WORDS};
use abi::{HostCall, HostState};

use crate::errno::Errno;
use crate::fs::File;
use crate::host::{Host, Misbehaviour};
use crate::machine::{Hidden, OddCall};
use crate::mm::{Holder, PAGE, Pfn, is_aligned};
use crate::play;
use crate::process::Process;

/// Requests: `_IOWR('D', n, u64[words])`. The programs have their own copy
/// (`host-stub/programs/src/uapi.rs`): these are the two sides of an interface.
pub mod request {
    const fn request(number: u32, words: u32) -> u32 {
        3 << 30 | (words * 8) << 16 | 0x44 << 8 | number
    }

    /// In x0 to x6, out x0 to x9 of an `HVC #0`.
    pub const CALL: u32 = request(0, 18);
    /// In address, write?, value; out value, 0 or 1 for an abort, ESR, FAR.
    pub const TOUCH: u32 = request(1, 6);
    /// In descriptor of a guest_memfd, byte offset; out frame number.
    pub const GMEM_PFN: u32 = request(2, 3);
    /// In bits of [`crate::host::Misbehaviour`].
    pub const MISBEHAVE: u32 = request(3, 1);
    /// Out frame number, in count.
    pub const ALLOC: u32 = request(4, 2);
    /// In frame number, count.
    pub const FREE: u32 = request(5, 2);
    /// Out free, used, given to pools, given to VMs, marked aborts, unshares.
    pub const STATS: u32 = request(6, 6);
    /// In descriptor of a VM; out handle.
    pub const VM_HANDLE: u32 = request(7, 2);
    /// In and out x0 to x3 of an `SMC #0`.
    pub const SMC: u32 = request(8, 4);
    /// In 1 (`HVC #1`) or 2 (`SMC #1`), x0 to x6; out x0.
    pub const HVC_IMM: u32 = request(9, 8);
    /// In address of an array of [`super::Record`]s, their number: done one after the other, each written back.
    pub const SERIES: u32 = request(10, 2);
    /// In address of a list, entries, rounds: see [`crate::play`].
    pub const PLAY: u32 = request(11, 3);
    /// Out the virtual counter at the kernel's first instruction.
    pub const COUNTER_AT_ENTRY: u32 = request(12, 1);
    /// In which of [`crate::machine::Hidden`]; out value, 0 or 1 for UNDEFINED, ESR.
    pub const HIDDEN: u32 = request(13, 4);
}

/// One of a series: in what to do (0 call, 1 load, 2 store, 3 copy a page), its arguments; out its results.
///
/// A call takes x0 to x6 and gives x0 to x9; a load takes an address, a store an address and a value, and both give
/// value, 0 or 1 for an abort, ESR, FAR; a copy takes the frame numbers of source and target, and gives 0 or 1 for
/// an abort.
pub type Record = [u64; RECORD_WORDS];
const RECORD_WORDS: usize = 10;
const RECORD_BYTES: usize = RECORD_WORDS * 8;
/// Records that one request can have.
const MAX_RECORDS: u64 = 256;

/// Serves a request. ENOTTY if there is none with this number.
pub fn ioctl(host: &mut Host, process: &mut Process, number: u32, argument: u64) -> Result<u64, Errno> {
    match number {
        request::CALL => with(host, process, argument, |host, _, words: &mut [u64; 18]| {
            let call = words.first_chunk::<CALL_WORDS>().copied().ok_or(Errno::EINVAL)?;
            let result = host.machine.call_words(&call);
            let out = words.first_chunk_mut::<RESULT_WORDS>().ok_or(Errno::EINVAL)?;
            *out = result;
            Ok(())
        }),
        request::TOUCH => with(host, process, argument, touch),
        request::GMEM_PFN => with(host, process, argument, gmem_pfn),
        request::MISBEHAVE => with(host, process, argument, |host, _, [bits]: &mut [u64; 1]| {
            host.misbehaviour = Misbehaviour::from_bits(*bits).ok_or(Errno::EINVAL)?;
            Ok(())
        }),
        request::ALLOC => with(host, process, argument, |host, _, [pfn, count]: &mut [u64; 2]| {
            let frame = host.frames.take_range(*count, Holder::Research).ok_or(Errno::ENOMEM)?;
            *pfn = frame.0;
            Ok(())
        }),
        request::FREE => with(host, process, argument, |host, _, [pfn, count]: &mut [u64; 2]| {
            free(host, Pfn(*pfn), *count)
        }),
        request::STATS => with(host, process, argument, |host, _, words: &mut [u64; 6]| {
            let census = host.frames.census();
            let counters = host.counters;
            *words = [
                census.free,
                census.used,
                census.pools,
                census.vms,
                counters.marked_aborts,
                counters.unshares,
            ];
            Ok(())
        }),
        request::VM_HANDLE => with(host, process, argument, |_, process, [vm, handle]: &mut [u64; 2]| {
            let file = process.files.get(*vm)?;
            let File::Vm(vm) = &*file else { return Err(Errno::EINVAL) };
            *handle = vm.handle().to_word();
            Ok(())
        }),
        request::SMC => with(host, process, argument, |host, _, words: &mut [u64; 4]| {
            *words = host.machine.smc(*words);
            Ok(())
        }),
        request::HVC_IMM => with(host, process, argument, |host, _, words: &mut [u64; 8]| {
            let [which, call @ ..] = words;
            let which_call = match which {
                1 => OddCall::Hvc1,
                2 => OddCall::Smc1,
                _ => return Err(Errno::EINVAL),
            };
            *which = host.machine.odd_call(which_call, call);
            Ok(())
        }),
        request::SERIES => with(host, process, argument, series),
        request::PLAY => with(host, process, argument, |host, process, [list, entries, rounds]| {
            play::play(host, process, *list, *entries, *rounds)
        }),
        request::COUNTER_AT_ENTRY => with(host, process, argument, |host, _, [count]: &mut [u64; 1]| {
            *count = host.machine.counter_at_entry();
            Ok(())
        }),
        request::HIDDEN => {
            with(host, process, argument, |host, _, [which, value, undefined, esr]: &mut [u64; 4]| {
                let register = Hidden::from_word(*which).ok_or(Errno::EINVAL)?;
                (*value, *undefined, *esr) = match host.machine.hidden(register) {
                    Ok(value) => (value, 0, 0),
                    Err(trap) => (0, 1, trap.esr),
                };
                Ok(())
            })
        }
        _ => Err(Errno::ENOTTY),
    }
}

/// Reads the array, serves the request, writes the array back.
fn with<'m, const N: usize>(
    host: &mut Host<'m>,
    process: &mut Process,
    argument: u64,
    serve: impl FnOnce(&mut Host<'m>, &mut Process, &mut [u64; N]) -> Result<(), Errno>,
) -> Result<u64, Errno> {
    let address = |index: u64| argument.checked_add(index.saturating_mul(8)).ok_or(Errno::EFAULT);
    let mut words = [0; N];
    for (index, word) in (0..).zip(&mut words) {
        let mut bytes = [0; 8];
        process.space.read(host, address(index)?, &mut bytes)?;
        *word = u64::from_le_bytes(bytes);
    }
    serve(host, process, &mut words)?;
    for (index, word) in (0..).zip(words) {
        process.space.write(host, address(index)?, &word.to_le_bytes())?;
    }
    Ok(0)
}

/// The kernel's own load or store, through the linear map.
fn touch(host: &mut Host, _: &mut Process, words: &mut [u64; 6]) -> Result<(), Errno> {
    let [address, write, value, failed, esr, far] = words;
    [*value, *failed, *esr, *far] = access(host, *address, *write != 0, *value)?;
    Ok(())
}

/// Returns the value, 0 or 1 for an abort, ESR, FAR.
fn access(host: &mut Host, address: u64, write: bool, value: u64) -> Result<[u64; 4], Errno> {
    if !address.is_multiple_of(8) {
        return Err(Errno::EINVAL);
    }
    let outcome =
        if write { host.machine.store(address, value).map(|()| value) } else { host.machine.load(address) };
    Ok(match outcome {
        Ok(loaded) => [loaded, 0, 0, 0],
        Err(abort) => {
            host.note_abort(abort);
            [value, 1, abort.esr, abort.far]
        }
    })
}

/// Does all records of an array, with one copy in and one out: what a program does thousands of times a second.
fn series(host: &mut Host, process: &mut Process, words: &mut [u64; 2]) -> Result<(), Errno> {
    let [address, count] = *words;
    if count > MAX_RECORDS {
        return Err(Errno::EINVAL);
    }
    let mut bytes = alloc::vec![0; (count as usize).saturating_mul(RECORD_BYTES)];
    process.space.read(host, address, &mut bytes)?;
    for record in bytes.chunks_exact_mut(RECORD_BYTES) {
        let mut words: Record = [0; RECORD_WORDS];
        for (word, bytes) in words.iter_mut().zip(record.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().map_err(|_| Errno::EINVAL)?);
        }
        serve_record(host, &mut words)?;
        for (word, bytes) in words.iter().zip(record.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    process.space.write(host, address, &bytes)
}

fn serve_record(host: &mut Host, words: &mut Record) -> Result<(), Errno> {
    let [kind, call @ .., _, _] = words;
    let [a, b, ..] = *call;
    match *kind {
        0 => *words = host.machine.call_words(call),
        1 | 2 => {
            let [value, failed, esr, far] = access(host, a, *kind == 2, b)?;
            *words = [value, failed, esr, far, 0, 0, 0, 0, 0, 0];
        }
        3 => {
            let copied = copy(host, Pfn(a), Pfn(b));
            *words = [u64::from(!copied), 0, 0, 0, 0, 0, 0, 0, 0, 0];
        }
        _ => return Err(Errno::EINVAL),
    }
    Ok(())
}

/// Copies a page; `false` if an access took an abort.
fn copy(host: &mut Host, from: Pfn, to: Pfn) -> bool {
    let mut page = [0; PAGE as usize];
    let copied =
        host.machine.read(from.address(), &mut page).and_then(|()| host.machine.write(to.address(), &page));
    copied.map_err(|abort| host.note_abort(abort)).is_ok()
}

fn gmem_pfn(_: &mut Host, process: &mut Process, words: &mut [u64; 3]) -> Result<(), Errno> {
    let [descriptor, offset, pfn] = words;
    let file = process.files.get(*descriptor)?;
    let File::Gmem(view) = &*file else { return Err(Errno::EINVAL) };
    if !is_aligned(*offset) {
        return Err(Errno::EINVAL);
    }
    *pfn = view.inode().page(*offset / PAGE).ok_or(Errno::ENOENT)?.frame.0;
    Ok(())
}

/// Frees pages of this device. All of the range must be the device's: otherwise EINVAL; and EL2 must know them
/// as the host's own: otherwise EBUSY. Then nothing is freed.
fn free(host: &mut Host, first: Pfn, count: u64) -> Result<(), Errno> {
    let end = first.0.checked_add(count).ok_or(Errno::EINVAL)?;
    if (first.0..end).any(|number| host.frames.holder(Pfn(number)) != Some(Holder::Research)) {
        return Err(Errno::EINVAL);
    }
    for pfn in first.0..end {
        let state = host.call(HostCall::QueryPage { pfn }).ok().and_then(|result| result.host_state());
        if state.is_some_and(|state| state != HostState::Owned) {
            return Err(Errno::EBUSY);
        }
    }
    for number in first.0..end {
        host.give_back(Pfn(number));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::request;

    #[test]
    fn the_numbers_are_those_of_the_contract() {
        assert_eq!(request::CALL, 0xc090_4400);
        assert_eq!(request::TOUCH, 0xc030_4401);
        assert_eq!(request::GMEM_PFN, 0xc018_4402);
        assert_eq!(request::MISBEHAVE, 0xc008_4403);
        assert_eq!(request::ALLOC, 0xc010_4404);
        assert_eq!(request::FREE, 0xc010_4405);
        assert_eq!(request::STATS, 0xc030_4406);
        assert_eq!(request::VM_HANDLE, 0xc010_4407);
        assert_eq!(request::SMC, 0xc020_4408);
        assert_eq!(request::HVC_IMM, 0xc040_4409);
        assert_eq!(request::SERIES, 0xc010_440a);
        assert_eq!(request::PLAY, 0xc018_440b);
        assert_eq!(request::COUNTER_AT_ENTRY, 0xc008_440c);
        assert_eq!(request::HIDDEN, 0xc020_440d);
    }
}
