//! The bytes of a flattened device tree: tokens out of one, tokens into another (Devicetree Specification,
//! chapter 5).
//!
//! Boot runs once, so its code is to be small rather than fast: what is called from several places is not inlined.

const MAGIC: u32 = 0xd00d_feed;
const VERSION: u32 = 17;
const LAST_COMPATIBLE_VERSION: u32 = 16;
const HEADER_SIZE: usize = 40;
/// Bytes of an entry of the memory reservation block; the block ends with one of zeros.
const RESERVATION_SIZE: usize = 16;
const TOKEN_SIZE: usize = 4;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;

/// Words of the header, by index.
mod word {
    pub(super) const MAGIC: usize = 0;
    pub(super) const TOTAL_SIZE: usize = 1;
    pub(super) const STRUCTURE: usize = 2;
    pub(super) const STRINGS: usize = 3;
    pub(super) const RESERVATIONS: usize = 4;
    pub(super) const LAST_COMPATIBLE_VERSION: usize = 6;
    pub(super) const BOOT_CPU: usize = 7;
    pub(super) const STRINGS_SIZE: usize = 8;
    pub(super) const STRUCTURE_SIZE: usize = 9;
}

/// Cells of addresses and sizes where a node does not say (Devicetree Specification, 2.3.5).
pub const DEFAULT_CELLS: (u32, u32) = (2, 1);

/// Names of properties that a [`Sink`] can add to what it copies.
const ADDED_NAMES: [&str; 10] = [
    "bootargs",
    "linux,initrd-start",
    "linux,initrd-end",
    "interrupts",
    "interrupt-names",
    "#address-cells",
    "#size-cells",
    "ranges",
    "reg",
    "no-map",
];

/// The length of a device tree, from its first 8 bytes; `None` if it is none.
pub fn total_size(start: &[u8; 8]) -> Option<usize> {
    let (magic, size) = start.split_first_chunk::<4>()?;
    let size = u32::from_be_bytes(*size.first_chunk()?);
    (u32::from_be_bytes(*magic) == MAGIC).then_some(usize::try_from(size).ok()?)
}

/// A device tree to read.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
    reservations: &'a [u8],
    boot_cpu: u32,
    used: usize,
}

impl<'a> Source<'a> {
    /// Finds the blocks of a tree; `None` if its header makes no sense.
    pub fn new(blob: &'a [u8]) -> Option<Self> {
        let word = |index: usize| {
            let bytes = blob.get(index.checked_mul(4)?..)?.first_chunk()?;
            usize::try_from(u32::from_be_bytes(*bytes)).ok()
        };
        let known =
            word(word::MAGIC)? == MAGIC as usize && word(word::LAST_COMPATIBLE_VERSION)? <= VERSION as usize;
        let blob = blob.get(..word(word::TOTAL_SIZE)?).filter(|_| known)?;
        let (structure_at, structure_size) = (word(word::STRUCTURE)?, word(word::STRUCTURE_SIZE)?);
        let (strings_at, strings_size) = (word(word::STRINGS)?, word(word::STRINGS_SIZE)?);
        let structure = blob.get(structure_at..structure_at.checked_add(structure_size)?)?;
        let strings = blob.get(strings_at..strings_at.checked_add(strings_size)?)?;
        // A name without an end would go on in what a [`Sink`] adds behind it.
        if strings.last().is_some_and(|end| *end != 0) {
            return None;
        }
        let rest = blob.get(word(word::RESERVATIONS)?..)?;
        let entries =
            rest.chunks_exact(RESERVATION_SIZE).position(|entry| entry.iter().all(|byte| *byte == 0))?;
        let reservations = rest.get(..entries.checked_add(1)?.checked_mul(RESERVATION_SIZE)?)?;
        Some(Self {
            structure,
            strings,
            reservations,
            boot_cpu: u32::try_from(word(word::BOOT_CPU)?).ok()?,
            used: structure_at.checked_add(structure_size)?.max(strings_at.checked_add(strings_size)?),
        })
    }

    /// Bytes of the blob up to the last that the tree uses.
    pub fn used(&self) -> usize {
        self.used
    }

    /// The memory reservations: address and size.
    pub fn reservations(&self) -> impl Iterator<Item = (u64, u64)> {
        let word = |entry: &[u8], at: usize| {
            entry
                .get(at..)
                .and_then(|bytes| bytes.first_chunk())
                .map_or(0, |bytes| u64::from_be_bytes(*bytes))
        };
        let entries = self.reservations.chunks_exact(RESERVATION_SIZE);
        // The last is the end mark.
        entries.take_while(|entry| entry.iter().any(|byte| *byte != 0)).map(move |e| (word(e, 0), word(e, 8)))
    }

    /// The tokens of the structure block.
    pub fn tokens(&self) -> Tokens<'a> {
        Tokens { rest: self.structure, names: self.strings.len() }
    }

    /// The name at an offset of the strings block, without its end mark; empty if there is none.
    #[inline(never)]
    pub fn string(&self, offset: u32) -> &'a [u8] {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.strings.get(offset..)).unwrap_or(&[]);
        rest.split(|byte| *byte == 0).next().unwrap_or(&[])
    }
}

/// A token of the structure block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token<'a> {
    /// A node begins.
    Begin(&'a [u8]),
    /// A node ends.
    End,
    /// A property of the node that began last.
    Property {
        /// Offset of its name in the strings block.
        name: u32,
        /// Its value.
        value: &'a [u8],
    },
    /// The structure block ends.
    Finish,
}

/// Reads tokens, NOPs left out.
#[derive(Clone, Debug)]
pub struct Tokens<'a> {
    rest: &'a [u8],
    /// Length of the strings block, in which names begin.
    names: usize,
}

impl<'a> Tokens<'a> {
    /// The next token; `None` where the block is cut off or holds none.
    #[expect(clippy::should_implement_trait, reason = "the end of the block is a token, and None an error")]
    pub fn next(&mut self) -> Option<Token<'a>> {
        loop {
            match self.word()? {
                NOP => {}
                BEGIN_NODE => {
                    let length = self.rest.iter().position(|byte| *byte == 0)?;
                    let name = self.rest.get(..length)?;
                    self.skip(length.checked_add(1)?)?;
                    return Some(Token::Begin(name));
                }
                END_NODE => return Some(Token::End),
                PROPERTY => {
                    let length = usize::try_from(self.word()?).ok()?;
                    // A name behind the block's end is none yet, and would be one in a longer block.
                    let name = self.word().filter(|name| (*name as usize) < self.names)?;
                    let value = self.rest.get(..length)?;
                    self.skip(length)?;
                    return Some(Token::Property { name, value });
                }
                END => return Some(Token::Finish),
                _ => return None,
            }
        }
    }

    /// What has not been read yet, from which [`Sink::copy`] can copy.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Reads past the end of a node whose beginning has been read.
    #[inline(never)]
    pub fn skip_node(&mut self) -> Option<()> {
        let mut depth = 1u32;
        while depth > 0 {
            depth = match self.next()? {
                Token::Begin(_) => depth.checked_add(1)?,
                Token::End => depth.checked_sub(1)?,
                Token::Property { .. } => depth,
                Token::Finish => return None,
            };
        }
        Some(())
    }

    #[inline(never)]
    fn word(&mut self) -> Option<u32> {
        let (word, rest) = self.rest.split_first_chunk()?;
        self.rest = rest;
        Some(u32::from_be_bytes(*word))
    }

    /// Goes on behind `bytes` bytes and the padding to the next token.
    #[inline(never)]
    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.rest = self.rest.get(bytes.checked_next_multiple_of(TOKEN_SIZE)?..)?;
        Some(())
    }
}

/// A device tree to write. Every method returns `None` when the buffer is full.
#[derive(Debug)]
pub struct Sink<'b> {
    out: &'b mut [u8],
    at: usize,
    structure: usize,
    old_strings: usize,
}

impl<'b> Sink<'b> {
    /// Begins a tree with the reservations and the strings of another.
    pub fn new(out: &'b mut [u8], source: &Source<'_>) -> Option<Self> {
        let structure = HEADER_SIZE.checked_add(source.reservations.len())?;
        out.get_mut(HEADER_SIZE..structure)?.copy_from_slice(source.reservations);
        Some(Self { out, at: structure, structure, old_strings: source.strings.len() })
    }

    /// Begins a node.
    #[inline(never)]
    pub fn begin(&mut self, name: &[u8]) -> Option<()> {
        self.word(BEGIN_NODE)?;
        self.padded(name, 1)
    }

    /// Ends a node.
    pub fn end(&mut self) -> Option<()> {
        self.word(END_NODE)
    }

    /// Copies what lies in the old structure block between two states of its reader.
    pub fn copy(&mut self, from: &[u8], behind: &[u8]) -> Option<()> {
        self.bytes(from.get(..from.len().checked_sub(behind.len())?)?)
    }

    /// Adds a property whose name is at an offset of the old strings.
    pub fn property_as(&mut self, name: u32, value: &[u8]) -> Option<()> {
        self.property_header(name, value.len())?;
        self.padded(value, 0)
    }

    /// Adds a property by name, one of `ADDED_NAMES`.
    pub fn property(&mut self, name: &str, value: &[u8]) -> Option<()> {
        let name = self.name_offset(name)?;
        self.property_as(name, value)
    }

    /// Adds a property that is a text.
    pub fn text_property(&mut self, name: &str, value: &str) -> Option<()> {
        let name = self.name_offset(name)?;
        self.property_header(name, value.len().checked_add(1)?)?;
        self.padded(value.as_bytes(), 1)
    }

    /// Ends the tree and returns its length.
    pub fn finish(mut self, source: &Source<'_>) -> Option<usize> {
        self.word(END)?;
        let strings = self.at;
        self.bytes(source.strings)?;
        for name in ADDED_NAMES {
            self.bytes(name.as_bytes())?;
            self.bytes(&[0])?;
        }
        let total = self.at;
        let header = [
            MAGIC,
            u32::try_from(total).ok()?,
            u32::try_from(self.structure).ok()?,
            u32::try_from(strings).ok()?,
            u32::try_from(HEADER_SIZE).ok()?,
            VERSION,
            LAST_COMPATIBLE_VERSION,
            source.boot_cpu,
            u32::try_from(total.checked_sub(strings)?).ok()?,
            u32::try_from(strings.checked_sub(self.structure)?).ok()?,
        ];
        self.at = 0;
        header.into_iter().try_for_each(|word| self.word(word))?;
        Some(total)
    }

    /// Where a name will be: all that can be added follow the old strings, in order.
    fn name_offset(&self, name: &str) -> Option<u32> {
        let mut offset = self.old_strings;
        for added in ADDED_NAMES {
            if added == name {
                return u32::try_from(offset).ok();
            }
            offset = offset.checked_add(added.len())?.checked_add(1)?;
        }
        None
    }

    #[inline(never)]
    fn property_header(&mut self, name: u32, length: usize) -> Option<()> {
        self.word(PROPERTY)?;
        self.word(u32::try_from(length).ok()?)?;
        self.word(name)
    }

    #[inline(never)]
    fn word(&mut self, word: u32) -> Option<()> {
        self.bytes(&word.to_be_bytes())
    }

    /// Adds bytes, at least `zeros` zeros, and padding to the next token.
    #[inline(never)]
    fn padded(&mut self, bytes: &[u8], zeros: usize) -> Option<()> {
        self.bytes(bytes)?;
        let end = self.at.checked_add(zeros)?.checked_next_multiple_of(TOKEN_SIZE)?;
        self.out.get_mut(self.at..end)?.fill(0);
        self.at = end;
        Some(())
    }

    #[inline(never)]
    fn bytes(&mut self, bytes: &[u8]) -> Option<()> {
        let end = self.at.checked_add(bytes.len())?;
        self.out.get_mut(self.at..end)?.copy_from_slice(bytes);
        self.at = end;
        Some(())
    }
}
