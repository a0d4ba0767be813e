use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

/// Documents of these lengths; every token has an id of its own, and every third document has a given half.
fn documents(lengths: &[usize]) -> Arc<Documents> {
    let mut documents = Documents::default();
    let mut next = 0;
    for (index, len) in lengths.iter().enumerate() {
        let ids: Vec<u32> = (next..next + *len as u32).collect();
        next += *len as u32;
        let given = if index % 3 == 0 { len / 2 } else { 0 };
        documents.push(&ids, &(0..*len).map(|token| token >= given).collect::<Vec<_>>());
    }
    Arc::new(documents)
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let len = prop_oneof![0..4_usize, 1..40_usize, 16..=17_usize];
    prop::collection::vec(len, 1..120).prop_filter("some token", |lengths| lengths.iter().sum::<usize>() > 0)
}

/// Batches until an epoch begins anew, with one row each.
fn epoch(batches: &mut Batches) -> Vec<Batch> {
    let epoch = batches.position().epoch;
    let mut seen = Vec::new();
    while batches.position().epoch == epoch {
        let mut batch = Batch::default();
        batches.next_into(&mut batch);
        seen.push(batch);
    }
    seen
}

proptest! {
    #[test]
    fn every_token_comes_once_an_epoch_and_in_order(lengths in lengths(), row in 1..40_usize, seed: u64) {
        let documents = documents(&lengths);
        let mut batches = Batches::new(documents.clone(), row, 1, seed).unwrap();
        for _ in 0..2 {
            let mut seen: HashMap<usize, Vec<u32>> = HashMap::new();
            let cut = batches.rows().cut_documents();
            for batch in epoch(&mut batches) {
                for segment in &batch.segments {
                    let ids = &batch.ids[segment.start..segment.start + segment.len];
                    seen.entry(segment.document).or_default().extend(ids);
                }
            }
            for index in 0..documents.len() {
                let ids = seen.remove(&index).unwrap_or_default();
                prop_assert_eq!(documents.get(index).unwrap().ids, &ids[..]);
            }
            prop_assert_eq!(cut, lengths.iter().filter(|len| **len > row).count());
        }
    }

    #[test]
    fn rows_keep_to_their_length_and_a_document_that_fits_is_whole(lengths in lengths(), row in 1..40_usize) {
        let mut batches = Batches::new(documents(&lengths), row, 1, 0).unwrap();
        for batch in epoch(&mut batches) {
            prop_assert!((1..=row).contains(&batch.tokens()));
            for segment in &batch.segments {
                let len = lengths[segment.document];
                prop_assert!(segment.len == len || len > row);
            }
        }
    }

    #[test]
    fn labels_are_the_next_token_of_the_document_and_count_where_it_is_learnt(
        lengths in lengths(), row in 1..40_usize, rows in 1..5_usize,
    ) {
        let documents = documents(&lengths);
        let mut batches = Batches::new(documents.clone(), row, rows, 1).unwrap();
        let mut batch = Batch::default();
        for _ in 0..8 {
            batches.next_into(&mut batch);
            let mut end = 0;
            for segment in &batch.segments {
                prop_assert_eq!(segment.start, end);
                end += segment.len;
                let document = documents.get(segment.document).unwrap();
                for token in segment.start..end {
                    let place = (batch.ids[token] - document.ids[0]) as usize;
                    let next = document.ids.get(place + 1).copied();
                    prop_assert_eq!(batch.labels[token], next.unwrap_or(NO_LABEL));
                    prop_assert_eq!(batch.counted[token], next.is_some() && document.counts[place + 1]);
                }
            }
            prop_assert_eq!(end, batch.tokens());
            prop_assert_eq!((batch.labels.len(), batch.counted.len()), (end, end));
            prop_assert!(batch.tokens() <= batches.most_tokens());
        }
    }

    #[test]
    fn a_resumed_run_has_the_batches_that_it_would_have_had(
        lengths in lengths(), row in 1..40_usize, rows in 1..5_usize, seed: u64, steps in 0..20_usize,
    ) {
        let documents = documents(&lengths);
        let mut run = Batches::new(documents.clone(), row, rows, seed).unwrap();
        let (mut here, mut there) = (Batch::default(), Batch::default());
        for _ in 0..steps {
            run.next_into(&mut here);
        }
        let saved = serde_json::to_string(run.position()).unwrap();
        let position: Position = serde_json::from_str(&saved).unwrap();
        let mut resumed = Batches::new(documents, row, rows, seed).unwrap().resume(&position).unwrap();
        for _ in 0..10 {
            run.next_into(&mut here);
            resumed.next_into(&mut there);
            prop_assert_eq!(&here, &there);
            prop_assert_eq!(run.position(), resumed.position());
        }
    }
}

#[test]
fn epochs_and_seeds_differ_in_their_order() {
    let ids = |batches: Vec<Batch>| -> Vec<u32> { batches.into_iter().flat_map(|batch| batch.ids).collect() };
    let make = |seed| Batches::new(documents(&[5; 50]), 16, 1, seed).unwrap();
    let mut batches = make(1);
    let (first, second) = (ids(epoch(&mut batches)), ids(epoch(&mut batches)));
    assert_ne!(first, second);
    assert_ne!(first, ids(epoch(&mut make(2))));
    assert_eq!(first, ids(epoch(&mut make(1))));
}

#[test]
fn a_waiting_document_that_fits_fills_the_rest_of_a_row() {
    let documents = documents(&[6, 5, 4, 5]);
    let rows = Rows::in_order(&documents, 10).unwrap();
    let mut batch = Batch::default();
    rows.append(&documents, 0..9, &mut batch);
    let order: Vec<usize> = batch.segments.iter().map(|segment| segment.document).collect();
    assert_eq!((order, rows.len()), (vec![0, 2, 1, 3], 2));
}

#[test]
fn steady_batches_reuse_their_buffers() {
    let mut batches = Batches::new(documents(&[7; 100]), 32, 4, 3).unwrap();
    let mut batch = Batch::default();
    batches.next_into(&mut batch);
    let address = (batch.ids.as_ptr(), batch.labels.as_ptr(), batch.counted.as_ptr());
    for _ in 0..50 {
        batches.next_into(&mut batch);
    }
    assert_eq!(address, (batch.ids.as_ptr(), batch.labels.as_ptr(), batch.counted.as_ptr()));
}

#[test]
fn nothing_to_pack_and_a_foreign_position_are_errors() {
    assert_eq!(Rows::in_order(&Documents::default(), 4).err(), Some(PackingError::NoTokens));
    let make = |lengths: &[usize], row, rows, seed| Batches::new(documents(lengths), row, rows, seed);
    assert_eq!(make(&[0], 4, 1, 0).err(), Some(PackingError::NoTokens));
    assert!(matches!(make(&[3], 0, 1, 0).err(), Some(PackingError::Zero(_))));
    assert!(matches!(make(&[3], 4, 0, 0).err(), Some(PackingError::Zero(_))));
    for (row, rows) in [(usize::MAX, 2), (1 << 20, 1 << 12)] {
        assert!(matches!(make(&[3], row, rows, 0).err(), Some(PackingError::TooLarge { .. })));
    }

    let position = make(&[3, 4], 4, 1, 0).unwrap().position().clone();
    for other in [make(&[3, 5], 4, 1, 0), make(&[3, 4], 5, 1, 0), make(&[3, 4], 4, 1, 1)] {
        assert!(matches!(other.unwrap().resume(&position), Err(PackingError::OtherData { .. })));
    }
    let past = Position { row: 2, ..position.clone() };
    let error = make(&[3, 4], 4, 1, 0).unwrap().resume(&past).err();
    assert_eq!(error, Some(PackingError::PastEnd { row: 2, rows: 2 }));
    assert!(make(&[3, 4], 4, 2, 0).unwrap().resume(&position).is_ok());
}
