-- Commits of repositories with an allowed license and at least one of the listed languages: one row
-- per commit and repository. Commits whose message is too short, too long or noise are left out.
-- Parameters: @licenses, @languages and @noise_subjects, arrays of strings.
WITH selected AS (
  SELECT licenses.repo_name, MIN(LOWER(licenses.license)) AS license
  FROM `bigquery-public-data.github_repos.licenses` AS licenses
  WHERE LOWER(licenses.license) IN UNNEST(@licenses)
    AND licenses.repo_name IN (
      SELECT languages.repo_name
      FROM `bigquery-public-data.github_repos.languages` AS languages
      CROSS JOIN UNNEST(languages.language) AS used
      WHERE used.name IN UNNEST(@languages)
    )
  GROUP BY licenses.repo_name
)
SELECT commits.commit, selected.repo_name, selected.license
FROM `bigquery-public-data.github_repos.commits` AS commits
CROSS JOIN UNNEST(commits.repo_name) AS name
JOIN selected ON selected.repo_name = name
WHERE CHAR_LENGTH(commits.message) > 5
  AND CHAR_LENGTH(commits.message) < 10000
  -- The subject: a message ends in a newline. TRIM without characters means blanks only in DuckDB.
  AND LOWER(TRIM(commits.subject, ' \n\r\t')) NOT IN UNNEST(@noise_subjects)
  AND NOT STARTS_WITH(LOWER(TRIM(commits.subject, ' \n\r\t')), 'merge')
